"""Weights and whole structures that are removed: criteria, patterns, allocation."""
