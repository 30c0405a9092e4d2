"""Callbacks that installed distributions add to every run."""

from __future__ import annotations

from typing import cast

from fulmen_fabric.rank_zero import rank_zero_warn
from fulmen_protocols import CALLBACKS, BrokenPlugin, MissingPackage, available, load_factory

__all__ = ["installed_callbacks"]


def installed_callbacks() -> list[object]:
    """What the factories of entry-point group ``fulmen.callbacks.v1`` return: each a callback, or a list of them.

    A factory that cannot be imported is reported and left out: nobody asked for it by name.
    """
    found: list[object] = []
    for name in available(CALLBACKS):
        try:
            factory = load_factory(CALLBACKS, name)
        except (BrokenPlugin, MissingPackage) as error:
            rank_zero_warn(f"{error} It is left out.")
            continue
        if not callable(factory):
            rank_zero_warn(f"callback {name!r} is registered as {factory!r}, which cannot be called. It is left out.")
            continue
        made: object = factory()
        found.extend(cast("list[object]", made) if isinstance(made, (list, tuple)) else [made])
    return found
