"""Packed keys and values on NVIDIA's GPUs by Triton; imported at first use."""
