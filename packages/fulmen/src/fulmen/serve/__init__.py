"""Serving: what a module needs to answer requests, and a callback that tries it before training."""

from fulmen.serve.servable_module import ServableModule
from fulmen.serve.servable_module_validator import ServableModuleValidator

__all__ = ["ServableModule", "ServableModuleValidator"]
