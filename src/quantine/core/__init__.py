"""Values that methods, formats and kernels share: requests (specs), grids, quantized matrices."""
