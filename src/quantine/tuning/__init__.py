"""Tuning: a quantized model, adjusted by gradient towards the float model."""
