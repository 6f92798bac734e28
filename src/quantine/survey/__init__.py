"""Which architectures of transformers can be quantized: each is tried on a small random model."""
