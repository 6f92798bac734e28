"""One run of quantization, from the request to the finished directory."""
