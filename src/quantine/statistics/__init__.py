"""Statistics taken of a model while text runs through it; those of several texts can be merged."""
