"""Everything that measures more than one recipe: sweeps, local search, comparison of points."""
