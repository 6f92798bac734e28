"""Running quantized models: packed modules, the native decoder, loading through transformers."""
