"""Every public module of Lightning has one of the same path here, with its names, or says why not."""

from __future__ import annotations

import ast
import csv
import importlib
import re
import subprocess
import sys
from argparse import Namespace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fulmen
from fulmen.callbacks import Timer, TQDMProgressBar
from fulmen.core import saving
from fulmen.demos import BoringDataModule, BoringModel
from fulmen.trainer.connectors import accelerator_connector
from fulmen.utilities import parsing
from fulmen_protocols import MisconfigurationException

lightning = pytest.importorskip("lightning")

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(lightning.__file__).parent

PRIVATE = {
    "accelerators.registry", "connector", "fabric.cli", "strategies.registry", "trainer.configuration_validator",
    "trainer.setup", "utilities.argparse", "utilities.device_dtype_mixin", "utilities.device_parser",
    "utilities.imports", "utilities.init", "utilities.load", "utilities.logger", "utilities.optimizer",
    "utilities.registry", "utilities.signature_utils", "utilities.testing", "loggers.utilities",
    "plugins.io.wrapper", "plugins.precision.utils", "utilities.model_summary.model_summary_deepspeed",
}  # fmt: skip
"""Modules for Lightning's own use: docs/differences.md has a row for all of them."""

REFUSED = {
    "loggers.litlogger", "loggers.neptune", "loops", "plugins.collectives", "plugins.precision.fsdp",
    "strategies.launchers", "strategies.parallel", "trainer.call", "trainer.connectors.callback_connector",
    "trainer.connectors.checkpoint_connector", "trainer.connectors.data_connector",
    "trainer.connectors.logger_connector", "trainer.connectors.signal_connector", "utilities.migration",
    "utilities.model_registry",
}  # fmt: skip

GONE = {
    "accelerators.cpu": {"get_cpu_stats"},
    "accelerators.mps": {"get_device_stats"},
    "callbacks.progress.rich_progress": {
        "BatchesProcessedColumn", "CustomBarColumn", "CustomInfiniteTask", "CustomProgress", "CustomTimeColumn",
        "MetricsTextColumn", "ProcessingSpeedColumn",
    },
    "core.optimizer": {"do_nothing_closure"},
    "core.saving": {"convert", "update_hparams"},
    "loggers": {"LitLogger"},
    "loggers.comet": {"comet_experiment"},
    "loggers.csv_logs": {"ExperimentWriter"},
    "overrides.distributed": {"prepare_for_backward"},
    "plugins": {"FSDPPrecision"},
    "plugins.precision": {"FSDPPrecision"},
    "plugins.precision.double": {"LightningDoublePrecisionModule"},
    "plugins.environments.lightning": {"find_free_network_port"},
    "plugins.collectives.torch_collective": {"default_pg_timeout"},
    "profilers.pytorch": {"RegisterRecordFunction", "ScheduleWrapper"},
    "strategies": {"ParallelStrategy"},
    "strategies.deepspeed": {"remove_module_hooks"},
    "utilities.apply_func": {"convert_to_tensors"},
    "utilities.deepspeed": {"ds_checkpoint_dir"},
    "utilities.data": {"has_len_all_ranks"},
    "utilities.model_summary": {"DeepSpeedSummary"},
    "utilities.parsing": {
        "clean_namespace", "collect_init_args", "get_init_args", "parse_class_init_keys", "save_hyperparameters",
    },
    "utilities.types": {"CollectibleGroup", "Optimizable", "Steppable"},
}  # fmt: skip
"""Names in docs/differences.md, or used by nobody but Lightning's own classes."""


def public_modules() -> Iterator[tuple[str, str, Path]]:
    """Where it is here, its path below its package, and its source."""
    for package, ours in (("pytorch", "fulmen"), ("fabric", "fulmen_fabric")):
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT / package).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not parts or any(part.startswith("_") for part in parts):
                continue
            shared = parts[0] in ("accelerators", "loggers", "plugins", "strategies", "utilities")
            path = ".".join(parts)
            yield f"{'fulmen' if shared else ours}.{path}", path if path != "cli" else f"{package}.{path}", file


def public_names(file: Path) -> set[str]:
    """Classes and functions defined there, and of a package what it lists or imports from its own modules."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and file.name == "__init__.py":
            names |= {alias.asname or alias.name for alias in node.names if (node.module or "").startswith("lightning")}
    return {name for name in names if not name.startswith("_")}


MODULES = list(public_modules())


def below(path: str, places: set[str]) -> bool:
    return any(path == place or path.startswith(f"{place}.") for place in places)


@pytest.mark.parametrize(
    ("ours", "path", "file"), [each for each in MODULES if not below(each[1], PRIVATE | REFUSED)], ids=lambda x: str(x)
)
@pytest.mark.filterwarnings("ignore")
def test_a_module_and_its_names_are_at_lightnings_path(ours: str, path: str, file: Path) -> None:
    module = importlib.import_module(ours)

    missing = {name for name in public_names(file) if not hasattr_or_refused(module, name)}
    assert missing <= GONE.get(path, set()), f"not in {ours}: {sorted(missing)}"


def hasattr_or_refused(module: Any, name: str) -> bool:
    try:
        return hasattr(module, name)
    except ImportError as error:  # one that says why, or what to install
        return False if "has no" in str(error) else "pip install" in str(error)


@pytest.mark.parametrize(
    ("ours", "path"), [(ours, path) for ours, path, _ in MODULES if below(path, REFUSED)], ids=lambda x: str(x)
)
def test_a_module_without_a_counterpart_says_so_and_so_do_those_below_it(ours: str, path: str) -> None:
    place = next(place for place in REFUSED if below(path, {place}))
    parent, _, name = f"fulmen.{place}".rpartition(".")
    with pytest.raises(ImportError, match=rf"{re.escape(parent)} has no {name}: \w.*\.$") as caught:
        importlib.import_module(ours)
    assert not isinstance(caught.value, ModuleNotFoundError)


def test_the_modules_that_are_said_to_be_lightnings_own_are_still_there() -> None:
    paths = {path for _, path, _ in MODULES}
    assert paths >= PRIVATE | REFUSED
    documented = (Path(__file__).parents[1] / "docs" / "differences.md").read_text()
    for place in ("trainer.call", "trainer.connectors", "strategies.launchers", "utilities.migration"):
        assert f"`{place}`" in documented


class Color(Enum):
    RED = 1


@pytest.mark.filterwarnings("ignore:.*Module.*:DeprecationWarning")
@pytest.mark.parametrize("suffix", ["yaml", "csv"])
def test_hyperparameters_in_files_are_exchanged_with_lightning(tmp_path: Path, suffix: str) -> None:
    theirs = importlib.import_module("lightning.pytorch.core.saving")
    kind = "yaml" if suffix == "yaml" else "tags_csv"
    values = {"lr": 0.1, "layers": [1, 2], "name": "net", "flag": True}
    for writer, reader in ((saving, theirs), (theirs, saving)):
        file = tmp_path / f"{writer.__name__}.{suffix}"
        getattr(writer, f"save_hparams_to_{kind}")(file, Namespace(**values))
        assert dict(getattr(reader, f"load_hparams_from_{kind}")(file)) == values


def test_what_yaml_cannot_hold_is_left_out_with_its_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"'net' has the type object"):
        saving.save_hparams_to_yaml(tmp_path / "h.yaml", {"net": object(), "color": Color.RED})
    assert saving.load_hparams_from_yaml(tmp_path / "h.yaml", use_omegaconf=False) == {"color": "RED"}


def test_an_attribute_is_found_and_set_wherever_it_is_held() -> None:
    model: Any = BoringModel()
    data: Any = BoringDataModule()
    model.save_hyperparameters({"lr": 0.1})
    model.lr = 0.1
    assert parsing.lightning_hasattr(model, "lr")
    assert not parsing.lightning_hasattr(model, "rate")

    parsing.lightning_setattr(model, "lr", 0.2)
    assert (model.lr, model.hparams.lr, parsing.lightning_getattr(model, "lr")) == (0.2, 0.2, 0.2)
    with pytest.raises(AttributeError, match="'rate'"):
        parsing.lightning_getattr(model, "rate")

    data.batch = 4
    trainer = fulmen.Trainer(fast_dev_run=1, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.fit(model, datamodule=data)
    assert parsing.lightning_getattr(model, "batch") == 4


def test_a_bar_of_ones_own_is_made_of_lightnings_parts() -> None:
    from fulmen.callbacks.progress.progress_bar import get_standard_metrics
    from fulmen.callbacks.progress.tqdm_progress import Tqdm, convert_inf
    from fulmen.callbacks.timer import Interval

    class Bar(TQDMProgressBar):
        def init_train_tqdm(self) -> Any:
            return Tqdm(desc="mine", disable=True, total=convert_inf(float("inf")))

        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            seen.append(get_standard_metrics(trainer))
            return super().get_metrics(trainer, pl_module)

    seen: list[dict[str, int | str]] = []
    trainer = fulmen.Trainer(
        max_epochs=1, limit_train_batches=1, limit_val_batches=0, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_model_summary=False,
        callbacks=[Bar(), Timer("00:01:00:00", interval=Interval.step)],
    )  # fmt: skip
    trainer.fit(BoringModel())
    assert seen
    assert all(not each for each in seen), "there is no logger, so no version"
    assert (convert_inf(3), convert_inf(None), convert_inf(float("nan"))) == (3, None, None)


@pytest.mark.parametrize(
    ("command", "said"), [("upgrade_checkpoint", "nothing-here"), ("consolidate_checkpoint", "nothing-here")]
)
def test_lightnings_commands_for_checkpoints_run_as_modules(tmp_path: Path, command: str, said: str) -> None:
    words = [sys.executable, "-m", f"fulmen.utilities.{command}", str(tmp_path / said)]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert said in ended.stderr


def test_a_csv_of_hyperparameters_has_lightnings_columns(tmp_path: Path) -> None:
    saving.save_hparams_to_tags_csv(tmp_path / "h.csv", {"lr": 0.1})
    with open(tmp_path / "h.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"key": "lr", "value": "0.1"}]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"accelerator": "auto", "devices": "auto"},
        {"accelerator": "cpu", "devices": 1},
        {"accelerator": "cpu", "devices": "2"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_programs_ask_which_devices_a_trainer_would_take_as_they_ask_lightning(arguments: dict[str, Any]) -> None:
    theirs, ours = (
        importlib.import_module(f"{package}.trainer.connectors.accelerator_connector")._AcceleratorConnector(
            **arguments
        )
        for package in ("lightning.pytorch", "fulmen")
    )

    assert ours._accelerator_flag == theirs._accelerator_flag
    assert ours._devices_flag == theirs._devices_flag
    assert ours.is_distributed == theirs.is_distributed
    assert ours.parallel_devices == (theirs._parallel_devices or [torch.device("cpu")])
    assert type(ours.accelerator).__name__ == type(theirs.accelerator).__name__


def test_devices_that_a_trainer_could_not_take_are_an_error_where_a_program_asks_for_them() -> None:
    with pytest.raises(MisconfigurationException, match=r"devices=0 .*Pass 1 or more"):
        accelerator_connector._AcceleratorConnector(accelerator="cpu", devices=0)
