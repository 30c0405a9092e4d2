"""Where and how new modules get their first values, outside of ZeRO's third stage, which has a way of its own."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = ["created_on"]


class _WithoutInitialisers(TorchFunctionMode):
    """The functions of ``torch.nn.init`` return their tensor as it is."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        given = kwargs or {}
        if getattr(func, "__module__", "") != "torch.nn.init":
            return func(*args, **given)
        return args[0] if args else given["tensor"]


@contextmanager
def created_on(device: torch.device, *, empty: bool) -> Generator[None]:
    """Within the block, new tensors live on ``device``; with ``empty`` parameters get no first values."""
    with ExitStack() as stack:
        if device != torch.get_default_device():  # it would intercept every call into torch for nothing
            stack.enter_context(device)
        if empty:
            stack.enter_context(_WithoutInitialisers())
        yield
