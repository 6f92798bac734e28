"""Calibration: cutting text into token segments, and running these through a model block by block.

Only one decoder block has its weights in memory at a time.
"""
