"""ACME's backends for fulmen."""
