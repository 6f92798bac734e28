"""Rotated models: the same function with other weights, which have fewer outliers."""
