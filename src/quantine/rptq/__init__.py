"""RPTQ (arXiv 2304.01089): a block's channels in clusters of alike ranges, and grids for them.

Everything is found with the block's float weights, on what the quantized blocks before it put out.
"""
