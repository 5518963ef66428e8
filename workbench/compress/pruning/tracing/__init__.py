"""Heads and neurons found by experiment: what changes with what, and which numbers go with them."""
