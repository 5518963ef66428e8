"""What any module may use: devices, progress, text, hooks, garbage collection, the environment."""
