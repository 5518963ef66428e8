"""Tasks: what a model is for, and how well it does it, item by item."""
