"""Weights, inputs and caches in few bits: grids, rounding, widths."""
