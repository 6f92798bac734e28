"""Parts of programs in Triton that several kernels have."""
