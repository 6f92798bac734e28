"""Calibration: text into token segments, and segments through the model one block at a time."""
