"""Programs that serve what quantine writes: each has a package, which joins it from outside.

See docs/engines.md.
"""
