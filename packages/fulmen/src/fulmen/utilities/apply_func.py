"""Nested collections of tensors, by the names people look for here; they live in fulmen-fabric."""

from fulmen_fabric import convert_tensors_to_scalars, move_data_to_device

__all__ = ["convert_tensors_to_scalars", "move_data_to_device"]
