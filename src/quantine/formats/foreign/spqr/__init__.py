"""Directories with ``quant_method: spqr``, which the kernels of SpQR's authors read."""
