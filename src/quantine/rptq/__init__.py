"""RPTQ (arXiv 2304.01089): clusters of channels with similar ranges, and grids for activations.

Clusters and grids of a block are found with its float weights, on the calibration text as the
quantized blocks before it put it out.
"""
