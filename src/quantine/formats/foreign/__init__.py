"""Layouts of other engines, a folder each."""
