"""Directories with ``quant_method: gptq``, versions 1 and 2 of the checkpoint format."""
