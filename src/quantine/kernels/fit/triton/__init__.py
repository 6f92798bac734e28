"""Fits of groups on NVIDIA's GPUs by Triton; imported at first use."""
