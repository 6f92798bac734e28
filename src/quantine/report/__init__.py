"""A quantized directory as one page of HTML."""
