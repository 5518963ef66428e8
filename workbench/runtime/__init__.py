"""Which kernel or engine runs a compressed model on this device, or why none does."""
