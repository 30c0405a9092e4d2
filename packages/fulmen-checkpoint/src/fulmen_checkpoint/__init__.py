"""Crash-safe checkpoints on any fsspec storage, for fulmen or for your own loop."""
