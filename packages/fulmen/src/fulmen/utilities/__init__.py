"""Helpers that user code imports by name."""
