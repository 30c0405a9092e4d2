"""Every public name of Lightning's packages is where the same path leads to here, or is gone for a reason."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

pytest.importorskip("lightning.pytorch")

pytestmark = pytest.mark.filterwarnings("ignore")

GONE = {
    "accelerators": {"XLAAccelerator", "register_accelerators"},
    "loggers": {"LitLogger"},
    "plugins": {"DeepSpeedPrecision", "FSDPPrecision", "XLACheckpointIO", "XLAPrecision"},
    "plugins.environments": {"XLAEnvironment"},
    "plugins.io": {"XLACheckpointIO"},
    "plugins.precision": {"DeepSpeedPrecision", "FSDPPrecision", "XLAPrecision"},
    "strategies": {"DeepSpeedStrategy", "ParallelStrategy"},
}
"""docs/differences.md says why, or they come with a package of their own."""

PLACES = [
    "accelerators", "callbacks", "cli", "core", "core.datamodule", "core.module", "demos.boring_classes", "loggers",
    "plugins", "plugins.environments", "plugins.io", "plugins.precision", "profilers", "strategies", "trainer", "tuner",
    "utilities",
]  # fmt: skip


def public_names(module: Any) -> set[str]:
    """What ``__all__`` lists, else the classes that are defined there or, in a package, re-exported from Fabric."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return set(listed)
    homes = (module.__name__, *(["lightning.fabric.plugins"] if hasattr(module, "__path__") else []))
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, type) and value.__module__.startswith(homes)
    }


@pytest.mark.parametrize("place", PLACES)
def test_a_public_name_of_lightning_is_at_the_same_place_here(place: str) -> None:
    theirs = public_names(importlib.import_module(f"lightning.pytorch.{place}"))
    ours = importlib.import_module(f"fulmen.{place}")

    assert theirs, "nothing was compared"
    missing = {name for name in theirs if not name.startswith("_") and name not in dir(ours)}
    assert missing <= GONE.get(place, set()), f"not in fulmen.{place}: {sorted(missing)}"
