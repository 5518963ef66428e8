"""Statistics of calibration data, computed once and kept, in memory and on disk."""
