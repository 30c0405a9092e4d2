"""Measurements against raw PyTorch. Every figure is a ratio or a difference to a raw loop of the same run.

Absolute times depend on the machine and on its neighbours; pairs taken in turns in one process much less so.
"""
