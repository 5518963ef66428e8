"""How compressed weights are stored, and which kernel runs them on this device, or why none does."""
