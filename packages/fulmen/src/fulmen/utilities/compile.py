"""LightningModules under ``torch.compile``: from the compiled wrapper to a module the Trainer can run, and back."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from fulmen._compiled_log import let_log_in_graphs
from fulmen.module import LightningModule
from fulmen_fabric.compiled import is_compiled
from fulmen_protocols import MisconfigurationException

__all__ = ["from_compiled", "is_compiled", "to_uncompiled"]

_METHODS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def from_compiled(model: nn.Module) -> LightningModule:
    """The LightningModule inside ``torch.compile(module)``, whose steps and forward run compiled from now on.

    ``torch.compile`` wraps a module in one of another class, of which only ``forward`` would be compiled. The module is
    changed in place; its weights keep their names. ``Trainer.fit`` and its siblings call this by themselves.

    Raises:
        MisconfigurationException: ``model`` is not compiled, or holds no LightningModule.
    """
    if not is_compiled(model):
        raise MisconfigurationException(
            f"from_compiled() got a {type(model).__name__}, which torch.compile did not make. Pass "
            "torch.compile(module)."
        )
    compiled = cast("Any", model)
    module = compiled._orig_mod
    if not isinstance(module, LightningModule):
        raise MisconfigurationException(
            f"from_compiled() got a compiled {type(module).__name__}, which is no LightningModule. Compile the module "
            "that defines training_step."
        )
    if module.compiled_from is not None:
        return module
    before: dict[str, Any] = {}
    for name in _METHODS:
        method = getattr(module, name)
        if getattr(method, "__func__", None) is getattr(LightningModule, name, None) or _is_torchs(method):
            continue  # nobody defines it, and it must not look as if somebody did
        before[name] = module.__dict__.get(name)
        module.__dict__[name] = compiled.dynamo_ctx(method)
    module.__dict__["compiled_from"] = before
    let_log_in_graphs(module)
    return module


def to_uncompiled(model: nn.Module) -> LightningModule:
    """The LightningModule without its compilation: of ``torch.compile(module)``, or of what ``from_compiled`` returned.

    Raises:
        MisconfigurationException: ``model`` is neither.
    """
    module = cast("Any", model)._orig_mod if is_compiled(model) else model
    if not isinstance(module, LightningModule):
        raise MisconfigurationException(
            f"to_uncompiled() got a {type(module).__name__}, which is no LightningModule, compiled or not."
        )
    if module.compiled_from is None:
        if module is model:
            raise MisconfigurationException(
                f"to_uncompiled() got a {type(module).__name__} that is not compiled. Pass torch.compile(module) or "
                "what from_compiled() returned."
            )
        return module
    for name, method in module.compiled_from.items():
        if method is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = method
    module.__dict__["compiled_from"] = None
    return module


def _is_torchs(method: object) -> bool:
    return getattr(method, "__func__", method) is nn.Module.forward or (
        getattr(method, "__name__", "") == "_forward_unimplemented"
    )
