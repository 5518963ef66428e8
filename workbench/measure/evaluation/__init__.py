"""Evaluation items scored by a model: each once, and what is known not computed again."""
