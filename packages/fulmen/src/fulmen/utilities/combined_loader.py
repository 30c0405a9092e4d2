"""CombinedLoader, by the name people look for here; it lives in fulmen-data."""

from fulmen_data import CombinedLoader

__all__ = ["CombinedLoader"]
