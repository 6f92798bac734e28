"""Plans: which matrix of a model is quantized how, checked before any work starts."""
