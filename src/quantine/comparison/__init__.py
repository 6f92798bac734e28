"""Comparisons: several plans for one model, each quantized and measured alike."""
