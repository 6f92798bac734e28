"""Quantized activations inside of models (RPTQ, arXiv 2304.01089).

Grids as modules that round, norms that write reordered channels, and attention that rounds queries,
keys, values and probabilities.
"""
