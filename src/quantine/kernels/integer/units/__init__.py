"""Matrices and inputs of integer products as GPUs read them, in plain PyTorch."""
