"""The random state of this process, taken and given back."""

from __future__ import annotations

import random
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from fulmen_data.worker_seeding import derive_seed

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["RandomState", "agreed_randomness", "restored_afterwards"]


class RandomState(NamedTuple):
    """State of torch's CPU generator, of ``random`` and of NumPy's global generator (None where not imported)."""

    torch_state: Tensor
    python_state: tuple[object, ...]
    numpy_state: object | None

    @classmethod
    def take(cls) -> RandomState:
        """The state now."""
        # Who never imported NumPy never drew from it.
        numpy = sys.modules.get("numpy")
        return cls(torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state())

    def restore(self) -> None:
        """Make this the state again."""
        torch.set_rng_state(self.torch_state)
        random.setstate(self.python_state)
        numpy = sys.modules.get("numpy")
        if numpy is not None and self.numpy_state is not None:
            numpy.random.set_state(self.numpy_state)

    def equals(self, other: RandomState) -> bool:
        """Whether every generator stands where it does in ``other``; NumPy's counts where both know it."""
        if not torch.equal(self.torch_state, other.torch_state) or self.python_state != other.python_state:
            return False
        if self.numpy_state is None or other.numpy_state is None:
            return True
        return _plain_numpy(self.numpy_state) == _plain_numpy(other.numpy_state)

    def to_plain(self) -> dict[str, object]:
        """Tensors, numbers and lists only, which any safe loader reads."""
        version, internal, gauss = cast("tuple[int, tuple[int, ...], float | None]", self.python_state)
        plain: dict[str, object] = {"torch": self.torch_state, "python": [version, list(internal), gauss]}
        if self.numpy_state is not None:
            plain["numpy"] = _plain_numpy(self.numpy_state)
        return plain

    @classmethod
    def from_plain(cls, plain: dict[str, object]) -> RandomState:
        """Undo ``to_plain``."""
        version, internal, gauss = cast("list[object]", plain["python"])
        numpy_state = cast("list[object] | None", plain.get("numpy"))
        return cls(
            cast("Tensor", plain["torch"]).cpu(),
            (version, tuple(cast("list[int]", internal)), gauss),
            None if numpy_state is None else tuple(numpy_state),
        )


def _plain_numpy(state: object | None) -> list[object] | None:
    if state is None:
        return None
    name, keys, position, has_gauss, cached = cast("tuple[str, list[int], int, int, float]", state)
    return [name, [int(key) for key in keys], int(position), int(has_gauss), float(cached)]


@contextmanager
def restored_afterwards() -> Generator[None]:
    """After the block, the random state is what it was before."""
    state = RandomState.take()
    try:
        yield
    finally:
        state.restore()


@contextmanager
def agreed_randomness(seed: int, epoch: int) -> Generator[None]:
    """Within the block every rank draws the same numbers, a function of ``seed`` and ``epoch``."""
    with restored_afterwards():
        torch.default_generator.manual_seed(derive_seed(seed, epoch, 0))
        random.seed(derive_seed(seed, epoch, 1))
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(derive_seed(seed, epoch, 2, bits=32))
        yield
