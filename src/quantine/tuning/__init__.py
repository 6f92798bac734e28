"""Tuning: numbers of a quantized model that are not codes, adjusted by gradient."""
