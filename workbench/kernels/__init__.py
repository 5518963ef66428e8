"""Kernels for a GPU, how they are launched, and the plain references that they are held against."""
