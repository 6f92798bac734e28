"""One run of quantization, from the checked request to the finished output directory."""
