"""Measuring models: perplexity, closeness to a reference, task scores, speed and memory."""
