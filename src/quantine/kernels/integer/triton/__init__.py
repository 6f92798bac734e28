"""Integer products and the rounding before them on NVIDIA's GPUs; imported at first use."""
