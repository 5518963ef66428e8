"""Weights as products of two narrow matrices, and what such products repair."""
