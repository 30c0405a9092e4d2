"""Drills: faults of every kind, many times over, and a table of what they did."""
