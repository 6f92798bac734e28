"""Directories of plain floats, which need nothing to be read."""
