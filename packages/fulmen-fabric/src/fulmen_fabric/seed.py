"""Random state: seeding a run, keeping a block from disturbing it, taking and restoring it."""

from __future__ import annotations

import os
import random
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypedDict, cast

import torch

from fulmen_fabric.rank_zero import rank_prefixed_message, rank_zero_info, rank_zero_only, rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from torch import Tensor

__all__ = [
    "RNGState",
    "collect_rng_state",
    "isolate_rng",
    "reset_seed",
    "restore_rng_state",
    "seed_everything",
]

_SEED_VARIABLE = "PL_GLOBAL_SEED"
_WORKERS_VARIABLE = "PL_SEED_WORKERS"
_MAX_SEED = 2**32 - 1  # numpy takes no more


class RNGState(TypedDict, total=False):
    """Every generator of this process as tensors and builtins: ``torch.load(weights_only=True)`` reads it back."""

    python: tuple[int, tuple[int, ...], float | None]
    numpy: tuple[str, Tensor, int, int, float]
    torch: Tensor
    device: dict[str, Tensor]
    """Device type (``"cuda"``) to the state of this process's device of that type."""


def seed_everything(seed: int | None = None, workers: bool | Literal["samples"] = False, verbose: bool = True) -> int:
    """Seed Python, NumPy (where installed) and torch on every device, and tell child processes through the environment.

    Sets ``PL_GLOBAL_SEED`` and ``PL_SEED_WORKERS``, which later launched ranks and loader workers read.

    Args:
        seed: 0 to 2^32 - 1. None: ``PL_GLOBAL_SEED``, or 0 with a warning.
        workers: whether loader workers get a ``worker_init_fn`` that seeds them per worker and rank. ``"samples"``:
            what a data set draws depends on seed, epoch and sample alone, whatever the number of workers and ranks, and
            after a resume (``fulmen_data.SeededDataset``).
        verbose: whether rank 0 logs the seed.

    Returns:
        The seed.

    Raises:
        ValueError: ``seed`` or ``PL_GLOBAL_SEED`` is no whole number in that range, or ``workers`` an unknown word.
    """
    if isinstance(workers, str) and workers != "samples":
        raise ValueError(f"seed_everything got workers={workers!r}. Use True, False or 'samples'.")
    if seed is None:
        found = os.environ.get(_SEED_VARIABLE)
        if found is None:
            seed = 0
            rank_zero_warn(f"seed_everything was given no seed and {_SEED_VARIABLE} is not set: using {seed}.")
        else:
            seed = _whole_number(found, _SEED_VARIABLE)
    else:
        seed = _whole_number(seed, "seed")
    if not 0 <= seed <= _MAX_SEED:
        raise ValueError(f"seed={seed} is out of range. Use 0 to {_MAX_SEED}.")

    if verbose:
        rank_zero_info(rank_prefixed_message(f"Seed set to {seed}", rank_zero_only.rank))
    os.environ[_SEED_VARIABLE] = str(seed)
    os.environ[_WORKERS_VARIABLE] = workers if isinstance(workers, str) else str(int(workers))
    _seed(seed)
    return seed


def _whole_number(value: object, name: str) -> int:
    try:
        return int(cast("int | str", value))
    except (TypeError, ValueError):
        raise ValueError(f"{name}={value!r} is not a whole number. Use 0 to {_MAX_SEED}.") from None


def reset_seed() -> None:
    """Seed again with ``PL_GLOBAL_SEED``, if it is set, so that every rank starts equal whatever ran before."""
    if os.environ.get(_SEED_VARIABLE) is not None:
        asked = os.environ.get(_WORKERS_VARIABLE, "0")
        seed_everything(None, workers="samples" if asked == "samples" else asked == "1", verbose=False)


def _seed(seed: int) -> None:
    random.seed(seed)
    try:
        import numpy as np
    except ModuleNotFoundError:
        pass
    else:
        np.random.seed(seed)
    torch.manual_seed(seed)


def collect_rng_state(device: torch.device | None = None) -> RNGState:
    """The state of every generator of this process, independent of later draws.

    Args:
        device: its generator is included as well. None: the current CUDA device, if CUDA is in use.
    """
    state: RNGState = {"python": cast("tuple[int, tuple[int, ...], float | None]", random.getstate())}
    if "numpy" in sys.modules:
        import numpy as np

        found = cast("dict[str, object]", np.random.get_state(legacy=False))
        words = cast("dict[str, object]", found["state"])
        state["numpy"] = (
            str(found["bit_generator"]),
            torch.from_numpy(np.asarray(words["key"]).astype(np.int64)),
            int(cast("int", words["pos"])),
            int(cast("int", found["has_gauss"])),
            float(cast("float", found["gauss"])),
        )
    state["torch"] = torch.get_rng_state()
    if device is None and _cuda_in_use():
        device = torch.device("cuda", torch.cuda.current_device())
    if device is not None and device.type != "cpu":
        state["device"] = {device.type: _device_state(device)}
    return state


def restore_rng_state(state: Mapping[str, object], device: torch.device | None = None) -> None:
    """Give every generator what ``collect_rng_state`` found.

    A generator that is not in use here (NumPy not imported, no such device) is left alone.

    Args:
        state: what ``collect_rng_state`` returned, as it was or read from a file.
        device: whose generator takes the device state. None: the current CUDA device.
    """
    known = cast("RNGState", state)
    if "python" in known:
        version, keys, gauss = known["python"]
        random.setstate((version, tuple(keys), gauss))
    if "numpy" in known and "numpy" in sys.modules:
        import numpy as np

        name, words, position, has_gauss, cached = known["numpy"]
        np.random.set_state((name, words.numpy().astype(np.uint32), position, has_gauss, cached))
    if "torch" in known:
        torch.set_rng_state(known["torch"].cpu())
    for kind, value in known.get("device", {}).items():
        if device is None and kind == "cuda" and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
        if device is not None and device.type == kind:
            _set_device_state(device, value.cpu())


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _device_state(device: torch.device) -> Tensor:
    if device.type == "mps":
        return torch.mps.get_rng_state()
    return cast("Tensor", torch.get_device_module(device).get_rng_state(device))


def _set_device_state(device: torch.device, state: Tensor) -> None:
    if device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


@contextmanager
def isolate_rng(include_cuda: bool = True) -> Generator[None, None, None]:
    """Within the block random draws are as they would be anyway; afterwards they go on as if it had not run.

    Args:
        include_cuda: whether every CUDA device's generator is kept too.
    """
    state = collect_rng_state()
    cuda = torch.cuda.get_rng_state_all() if include_cuda and _cuda_in_use() else None
    try:
        yield
    finally:
        if not include_cuda:
            state.pop("device", None)
        restore_rng_state(cast("Mapping[str, object]", state))
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
