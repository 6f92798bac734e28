"""Pictures of what a quantized directory holds."""
