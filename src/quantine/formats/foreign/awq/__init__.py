"""Directories with ``quant_method: awq``, which are read only."""
