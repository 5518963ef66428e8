"""Scripts run by hand, one a file, and the suite: `python -m benchmarks`."""
