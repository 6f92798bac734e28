"""Running models: sources, packed modules, and the doors to transformers."""
