"""Packed matrices as GPUs read them, in plain PyTorch."""
