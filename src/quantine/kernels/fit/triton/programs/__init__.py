"""Programs for GPUs in the language of Triton, which only looks like Python."""
