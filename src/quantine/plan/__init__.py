"""Plans: which matrix is quantized how, checked before any work starts."""
