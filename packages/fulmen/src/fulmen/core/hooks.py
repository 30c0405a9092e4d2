"""The hooks of modules and data modules, where Lightning has them."""

from fulmen._module_hooks import CheckpointHooks, DataHooks
from fulmen._module_hooks import ModuleHooks as ModelHooks  # Lightning's name

__all__ = ["CheckpointHooks", "DataHooks", "ModelHooks"]
