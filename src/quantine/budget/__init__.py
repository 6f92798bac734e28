"""Bits spent where they count: what choices would cost each layer, and which to take."""
