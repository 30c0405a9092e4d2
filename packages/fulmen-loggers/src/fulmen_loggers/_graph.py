"""Drawing a model by tracing it, without leaving a mark on it."""

from __future__ import annotations

import copy
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, cast

import torch

from fulmen_protocols.errors import MissingPackage

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from fulmen_loggers._event_files import EventFiles

__all__ = ["add_graph", "is_example"]


def is_example(value: object) -> bool:
    """Whether ``value`` can be traced with: a tensor, or a tuple of tensors."""
    if isinstance(value, tuple):
        return all(isinstance(item, torch.Tensor) for item in cast("tuple[object, ...]", value))
    return isinstance(value, torch.Tensor)


def add_graph(writer: EventFiles, model: nn.Module, example: object) -> None:
    """Trace ``model`` on ``example`` in evaluation mode and write the graph.

    Modes, buffers, gradients and random state are as before afterwards.

    Raises:
        MissingPackage: torch's converter of graphs needs the package ``tensorboard``.
    """
    try:
        import_module("torch.utils.tensorboard")  # which checks for the package itself
    except ImportError as error:
        raise MissingPackage(
            "TensorBoardLogger(log_graph=True) uses torch.utils.tensorboard to convert graphs, which needs the package "
            f"tensorboard: {error}. Run: pip install tensorboard"
        ) from error
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    moved = _to(example, device)
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    devices = [device] if device.type not in ("cpu", "meta") else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), warnings.catch_warnings():
            # Tracing is deprecated for export and warns of every branch; a picture is all that is wanted.
            warnings.simplefilter("ignore")
            model.eval()
            cast("Callable[..., None]", writer.add_graph)(model, moved)
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


def _to(example: object, device: torch.device) -> object:
    if isinstance(example, tuple):
        return tuple(_to(item, device) for item in cast("tuple[object, ...]", example))
    return example.to(device) if isinstance(example, torch.Tensor) else copy.copy(example)
