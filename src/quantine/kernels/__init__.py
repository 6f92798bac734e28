"""Kernels: a PyTorch reference that defines the meaning, and faster versions of the same."""
