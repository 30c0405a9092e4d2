"""Every public name of Lightning's packages is where the same path leads to here, or is gone for a reason."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

import fulmen
import fulmen_protocols.engine
import fulmen_protocols.precision
import fulmen_protocols.strategy
from fulmen import _foreign_methods

if TYPE_CHECKING:
    from collections.abc import Iterable

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


MODULES_READ_AS_ATTRIBUTES = """
import functools, importlib.util, json, sys
import fulmen as pl

for path in json.loads(sys.argv[1]):
    try:
        found = importlib.util.find_spec("fulmen." + path)
    except ImportError:  # a module that is there to say that it is not
        found = None
    if found is not None:
        try:
            value = functools.reduce(getattr, path.split("."), pl)
        except ImportError:
            continue
        assert value.__name__ == "fulmen." + path, value
        print(path)
"""


def modules_below(package: Any) -> set[str]:
    """Public modules that are there as attributes once Lightning is imported, by their paths."""
    found: set[str] = set()
    for name, value in vars(package).items():
        if isinstance(value, ModuleType) and value.__name__ == f"{package.__name__}.{name}" and name[0] != "_":
            found |= {value.__name__.removeprefix("lightning.pytorch."), *modules_below(value)}
    return found


def test_a_module_that_exists_can_be_read_as_an_attribute_without_importing_it_as_in_lightning() -> None:
    paths = sorted(modules_below(importlib.import_module("lightning.pytorch")))
    command = [sys.executable, "-c", MODULES_READ_AS_ATTRIBUTES, json.dumps(paths)]

    read = subprocess.run(command, text=True, capture_output=True, check=False)

    assert read.returncode == 0, read.stderr
    assert {"callbacks.early_stopping", "utilities.warnings", "trainer.states", "core.mixins"} <= set(
        read.stdout.split()
    )


def methods_of(classes: Iterable[Any]) -> set[str]:
    return {
        name for cls in classes for name in dir(cls) if not name.startswith("_") and callable(getattr(cls, name, None))
    }


@pytest.mark.proves("A.8")
@pytest.mark.parametrize(
    ("theirs", "kinds", "ours", "told"),
    [
        (
            "strategies",
            ("Single", "DDP", "FSDP", "Model"),
            (fulmen_protocols.strategy, fulmen_protocols.engine),
            "_STRATEGY",
        ),
        (
            "plugins.precision",
            ("Precision", "Mixed", "Half", "Double"),
            (fulmen_protocols.precision,),
            "_PRECISION",
        ),
    ],
)
def test_what_a_backend_may_override_in_lightning_is_called_here_or_told_of(
    theirs: str, kinds: tuple[str, ...], ours: tuple[Any, ...], told: str
) -> None:
    found = vars(importlib.import_module(f"lightning.pytorch.{theirs}"))
    overridable = methods_of(cls for name, cls in found.items() if name.startswith(kinds))
    protocols = [kind for module in ours for kind in vars(module).values() if isinstance(kind, type)]
    called = {name for kind in protocols for name in vars(kind)}
    uncalled = getattr(_foreign_methods, told).uncalled

    assert overridable
    assert overridable - called - uncalled == set()
    assert not uncalled & called, "told of, and called"


BEFORE = """
import lightning
import lightning as L
import lightning.pytorch as pl
import pytorch_lightning
from lightning import Fabric
from lightning.fabric import seed_everything
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch import Trainer, __version__
from lightning_fabric.loggers import CSVLogger

assert lightning.Trainer is L.Trainer is pl.Trainer is pytorch_lightning.Trainer
assert lightning.pytorch.callbacks.ModelCheckpoint is ModelCheckpoint
SEEN_AT = "https://lightning.ai/docs"
NOT_LIGHTNING = ["optuna.integration.pytorch_lightning", "ray.train.lightning.RayDDPStrategy", "runs/pytorch_lightning"]
VERSIONS = {lightning.__version__, L.__version__, pl.__version__, pytorch_lightning.__version__, __version__}
"""
OF_OTHERS = """
from ray.tune.integration.pytorch_lightning import TuneReportCallback
from optuna_integration.lightning import PyTorchLightningPruningCallback
SEEN_AT = "https://lightning.ai/docs/pytorch/stable/api/lightning.pytorch.tuner.tuning.Tuner.html"
"""


def move(folder: Path) -> Path:
    """Write BEFORE into a folder below, move all to fulmen as the guide says, and return the file."""
    guide = (Path(__file__).parents[1] / "docs" / "guides" / "from-lightning.md").read_text()
    [command] = [block for block in guide.split("```sh\n")[1:] if block.startswith("grep")]
    moved = folder / "project" / "train.py"
    moved.parent.mkdir()
    moved.write_text(BEFORE)
    subprocess.run(["bash", "-c", command.partition("```")[0]], cwd=folder, check=True)
    return moved


def test_the_command_of_the_guide_moves_a_project(tmp_path: Path) -> None:
    settings, others = tmp_path / "config.yaml", tmp_path / "others.py"
    others.write_text(OF_OTHERS)
    settings.write_text("class_path: lightning.pytorch.callbacks.Timer\n")

    moved = move(tmp_path)

    assert settings.read_text() == "class_path: fulmen.callbacks.Timer\n"
    assert others.read_text() == OF_OTHERS, "another package's module, and an address"
    names = runpy.run_path(str(moved))
    assert names["L"].__name__ == names["fulmen"].__name__ == "fulmen"
    assert names["rank_zero_only"].__module__.startswith("fulmen")
    assert names["SEEN_AT"] == "https://lightning.ai/docs"
    assert names["NOT_LIGHTNING"] == [
        "optuna.integration.pytorch_lightning", "ray.train.lightning.RayDDPStrategy", "runs/pytorch_lightning",
    ]  # fmt: skip
    lines = [line for line in moved.read_text().splitlines() if not line.startswith(("SEEN_AT", "NOT_LIGHTNING"))]
    assert "lightning" not in "\n".join(lines).replace("__lightning_version__", "")


def test_code_that_asks_for_lightnings_version_takes_the_same_branch_after_the_move(tmp_path: Path) -> None:
    [version] = runpy.run_path(str(move(tmp_path)))["VERSIONS"]
    theirs = importlib.import_module("lightning").__version__

    assert version.split(".")[:2] == theirs.split(".")[:2]
    assert fulmen.__version__ == importlib.metadata.version("fulmen")
