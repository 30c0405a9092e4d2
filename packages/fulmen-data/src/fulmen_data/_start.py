"""What decides the order of an epoch: the random state when its iterator is made."""

from __future__ import annotations

from typing import cast

import torch

from fulmen_data._random_state import RandomState

__all__ = ["EpochStart", "generators_of"]


class EpochStart:
    """Random state at ``iter``, and whether the loader's workers were already there."""

    def __init__(self, state: RandomState, generators: dict[str, torch.Tensor], workers_kept: bool) -> None:
        self.state = state
        self.generators = generators
        self.workers_kept = workers_kept

    @classmethod
    def take(cls, loader: object) -> EpochStart:
        """The state now, just before ``iter(loader)``."""
        generators = {path: generator.get_state() for path, generator in generators_of(loader).items()}
        kept = bool(getattr(loader, "persistent_workers", False)) and getattr(loader, "_iterator", None) is not None
        return cls(RandomState.take(), generators, kept)

    def restore(self, loader: object) -> None:
        """Make this the state of the process and of the loader's own generators again."""
        self.state.restore()
        for path, generator in generators_of(loader).items():
            if path in self.generators:
                generator.set_state(self.generators[path].cpu())

    def to_plain(self) -> dict[str, object]:
        """Numbers, lists and tensors."""
        return {
            "random": self.state.to_plain(),
            "generators": dict(self.generators),
            "workers_kept": self.workers_kept,
        }

    @classmethod
    def from_plain(cls, plain: dict[str, object] | None) -> EpochStart | None:
        """Undo ``to_plain``."""
        if plain is None:
            return None
        return cls(
            RandomState.from_plain(cast("dict[str, object]", plain["random"])),
            cast("dict[str, torch.Tensor]", plain["generators"]),
            cast("bool", plain["workers_kept"]),
        )


def generators_of(loader: object) -> dict[str, torch.Generator]:
    """The generators that a loader and its samplers were given, by the path of attributes to them, each once."""
    found: dict[str, torch.Generator] = {}
    waiting: list[tuple[str, object]] = [("", loader)]
    seen: set[int] = set()
    while waiting:
        path, holder = waiting.pop(0)
        generator: object = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator) and id(generator) not in seen:
            seen.add(id(generator))
            found[f"{path}generator"] = generator
        for name in ("sampler", "batch_sampler"):
            inner: object = getattr(holder, name, None)
            if inner is not None and id(inner) not in seen:
                seen.add(id(inner))
                waiting.append((f"{path}{name}.", inner))
    return found
