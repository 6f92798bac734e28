"""Many plans for one model, measured alike."""
