"""GPTQ's column loop on NVIDIA's GPUs by Triton; imported at first use."""
