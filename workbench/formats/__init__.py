"""How numbers are stored: grids, packed bits, forms on disk and in memory."""
