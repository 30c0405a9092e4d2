"""Hyperparameters in files, where Lightning has them: YAML of plain data, or CSV with columns ``key`` and ``value``."""

from __future__ import annotations

import csv
from argparse import Namespace
from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from fulmen import hparams as _hparams
from fulmen._files import open_text
from fulmen._loading import load_datamodule, load_module
from fulmen.datamodule import LightningDataModule
from fulmen.hparams import load_hparams_from_csv as load_hparams_from_tags_csv
from fulmen_fabric import rank_zero_warn

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike
    from typing import IO

    from fulmen.module import LightningModule

__all__ = [
    "_load_from_checkpoint",
    "load_hparams_from_tags_csv",
    "load_hparams_from_yaml",
    "save_hparams_to_tags_csv",
    "save_hparams_to_yaml",
]


def _load_from_checkpoint(
    cls: type[LightningModule | LightningDataModule],
    checkpoint_path: str | PathLike[str] | IO[bytes],
    map_location: Any = None,
    hparams_file: str | PathLike[str] | None = None,
    strict: bool | None = None,
    weights_only: bool | None = None,
    **kwargs: Any,
) -> Any:
    """What ``cls.load_from_checkpoint`` does where a class does not override it; libraries call it from what they have.

    Lightning's name, which it keeps private; ``super().load_from_checkpoint`` is the public way.
    """
    if issubclass(cls, LightningDataModule):
        return load_datamodule(cls, checkpoint_path, map_location, hparams_file, weights_only, kwargs)
    return load_module(cls, checkpoint_path, map_location, hparams_file, strict, weights_only, kwargs)


def load_hparams_from_yaml(config_yaml: str | PathLike[str], use_omegaconf: bool = True) -> Any:
    """Hyperparameters from a YAML file, local or remote. No code from the file is run.

    Args:
        config_yaml: path or URL.
        use_omegaconf: return a configuration of OmegaConf where that is installed, otherwise a dict.
    """
    values = _hparams.load_hparams_from_yaml(config_yaml)
    if use_omegaconf and find_spec("omegaconf") is not None:
        return cast("Any", import_module("omegaconf")).OmegaConf.create(values)
    return values


def save_hparams_to_yaml(
    config_yaml: str | PathLike[str], hparams: Mapping[str, Any] | Namespace, use_omegaconf: bool = True
) -> None:
    """Write hyperparameters to a YAML file whose folder is there; what is no plain data is left out, with a warning.

    Args:
        config_yaml: path or URL.
        hparams: a mapping, a namespace, or a configuration of OmegaConf, whose interpolations are resolved.
        use_omegaconf: as Lightning has it; the file is the same.
    """
    import yaml

    kept: dict[str, Any] = {}
    for name, value in _plain(hparams).items():
        plain: Any = value.name if isinstance(value, Enum) else value
        try:
            yaml.safe_dump(plain)
        except yaml.YAMLError:
            rank_zero_warn(
                f"hyperparameter {name!r} has the type {type(value).__name__}, which YAML cannot hold; it is left out "
                f"of {str(config_yaml)!r}."
            )
        else:
            kept[name] = plain
    with open_text(config_yaml, "w") as file:
        file.write(yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))


def save_hparams_to_tags_csv(tags_csv: str | PathLike[str], hparams: Mapping[str, Any] | Namespace) -> None:
    """Write hyperparameters to a CSV file whose folder is there, each as its text."""
    with open_text(tags_csv, "w") as file:
        rows = csv.writer(file)
        rows.writerow(("key", "value"))
        rows.writerows(_plain(hparams).items())


def _plain(hparams: Mapping[str, Any] | Namespace) -> dict[str, Any]:
    if isinstance(hparams, Namespace):
        return dict(vars(hparams))
    if type(hparams).__module__.partition(".")[0] == "omegaconf":
        return cast("dict[str, Any]", import_module("omegaconf").OmegaConf.to_container(hparams, resolve=True))
    return dict(hparams)
