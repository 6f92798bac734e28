"""Products of packed matrices on NVIDIA's GPUs by Triton; imported at first use."""
