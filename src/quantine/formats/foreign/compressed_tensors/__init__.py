"""Directories with ``quant_method: compressed-tensors`` in its format ``pack-quantized``."""
