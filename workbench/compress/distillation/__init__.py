"""Learning from the dense model or from other teachers."""
