"""Honest measurements: paired quality with intervals, three sizes, interleaved latency, peak memory."""
