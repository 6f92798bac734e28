"""GGUF files as sources: their headers, and what these say of the model."""
