"""Families of architectures that nobody has described: a small random model of one is studied."""
