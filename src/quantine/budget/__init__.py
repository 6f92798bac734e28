"""A budget of bits: what each choice would cost each layer, and which choices to take."""
