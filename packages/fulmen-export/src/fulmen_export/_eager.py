"""Running the module itself, for comparison, and leaving it as it was."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING, Self, cast

import torch

from fulmen_export._inputs import tensors_in
from fulmen_protocols.errors import ExportError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from fulmen_export._inputs import Inputs

__all__ = ["Eager"]


class Eager:
    """A module in evaluation mode, without gradients, for the length of a ``with`` block.

    Afterwards each submodule has the mode and the buffers that it had, and the random state is that of before.

    Raises:
        ExportError: its weights are sharded over processes, or were never made.
    """

    def __init__(self, what: str, module: nn.Module) -> None:
        self.module = module
        self._what = what
        for name, tensor in chain(module.named_parameters(), module.named_buffers()):
            found = "sharded over processes" if hasattr(tensor, "full_tensor") else "on the meta device, without values"
            if hasattr(tensor, "full_tensor") or tensor.is_meta:
                raise ExportError(
                    f"{what} cannot export {type(module).__name__}: {name!r} is {found}. Save a checkpoint, load it "
                    "into a module of one process (load_from_checkpoint), and export that."
                )

    def __enter__(self) -> Self:
        self._modes = [(module, module.training) for module in self.module.modules()]
        self._buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in self.module.modules()
            for name, buffer in module._buffers.items()  # pyright: ignore[reportPrivateUsage]
            if buffer is not None
        ]
        self._stack = ExitStack()
        self._stack.enter_context(torch.no_grad())
        self._stack.enter_context(cast("AbstractContextManager[None]", torch.random.fork_rng(devices=[])))
        self.module.eval()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore_buffers()
        for module, mode in self._modes:
            module.training = mode
        self._stack.close()

    def restore_buffers(self) -> None:
        """Give every buffer back the value that it had: a forward may count, or cache."""
        for module, name, buffer, value in self._buffers:
            if module._buffers.get(name) is not buffer:  # pyright: ignore[reportPrivateUsage]
                module._buffers[name] = buffer  # pyright: ignore[reportPrivateUsage]
            if not torch.equal(buffer, value):
                buffer.copy_(value)

    def outputs(self, inputs: Inputs) -> list[Tensor]:
        """The tensors that ``forward`` returns for ``inputs``, in order."""
        self.restore_buffers()
        own = inputs.copied()
        try:
            result = self.module(*own.args, **own.kwargs)
        except Exception as error:
            name = type(self.module).__name__
            error.add_note(f"raised by {name}.forward itself, which {self._what} ran on inputs of {inputs.shapes()}")
            raise
        self.restore_buffers()
        return [tensor.detach().clone() for tensor in tensors_in(result)]
