"""Rounded activations inside of models: grids as modules, reordered norms, attention."""
