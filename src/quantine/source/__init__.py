"""Where a model comes from, and its float weights."""
