"""Training of compressed models: what may move, steps, looks at held-out items, checkpoints."""
