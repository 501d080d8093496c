"""A run that survives: its folder, checkpoints, metrics and training loop."""
