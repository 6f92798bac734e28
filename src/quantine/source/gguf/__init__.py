"""GGUF files as sources: their headers, what these say of the model, and all parts as one file."""
