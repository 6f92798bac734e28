"""Packed matrices as GPUs read them, in plain PyTorch; `quantine.kernels.matrix.triton` computes."""
