"""Checkpoints to lerobot and back, with lerobot itself."""
