"""Values that every method, format and kernel shares: specs, grids, packed bits, statistics."""
