"""What is observed of a model while text runs through it; all of it can be merged."""
