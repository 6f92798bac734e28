"""The processes that share a run, as torchrun starts them, and what they tell each other."""
