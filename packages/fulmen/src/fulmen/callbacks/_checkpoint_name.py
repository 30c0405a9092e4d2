"""File names of checkpoints: ``{epoch}-{val_loss:.2f}`` with values filled in."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from fulmen import _files
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from fulmen.trainer import Trainer

__all__ = ["default_dirpath", "fill_in", "name_fields", "pattern_of"]

_FIELD = re.compile(r"\{([^{}:]*)(?::([^{}]*))?\}")


def fill_in(template: str, metrics: Mapping[str, Tensor | float], equals: str | None) -> str:
    """Replace every ``{name:format}`` by its value, 0 where there is none.

    Args:
        template: the name to fill in.
        metrics: values by name; tensors have one element and are read from the device here.
        equals: written between a name and its value; None writes the value alone.

    Raises:
        MisconfigurationException: a format does not fit its value.
    """

    def value_of(match: re.Match[str]) -> str:
        name, form = match[1], match[2] or ""
        value = metrics.get(name, 0)
        value = value if isinstance(value, (int, float)) else value.item()
        try:
            text = format(value, form)
        except ValueError as error:
            raise MisconfigurationException(
                f"the checkpoint's filename {template!r} formats {name!r} = {value!r} with {form!r}: {error}."
            ) from error
        return text if equals is None else f"{name}{equals}{text}"

    return _FIELD.sub(value_of, template)


def name_fields(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of what was logged, with ``epoch`` and ``step``, which are the counters unless they were logged, too."""
    fields = {name: value.detach().clone() for name, value in trainer.callback_metrics.items()}
    for name, counted in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
        logged = fields.get(name)
        fields[name] = torch.tensor(counted) if logged is None else logged.int()
    return fields


def pattern_of(template: str, equals: str | None, join: str, extension: str) -> re.Pattern[str]:
    """What names made from ``template`` look like, with a version number or without."""
    pattern, end = "", 0
    for field in _FIELD.finditer(template):
        name = "" if equals is None else re.escape(f"{field[1]}{equals}")
        pattern += re.escape(template[end : field.start()]) + name + ".*"
        end = field.end()
    return re.compile(f"{pattern}{re.escape(template[end:])}({re.escape(join)}v\\d+)?{re.escape(extension)}")


def default_dirpath(trainer: Trainer) -> str:
    """``checkpoints`` in the first logger's folder of this run, or in ``default_root_dir``."""
    root: str = trainer.default_root_dir
    parts: list[str] = []
    if trainer.loggers:
        logger = trainer.loggers[0]
        root = getattr(logger, "save_dir", None) or root
        version = logger.version
        if version is not None and not isinstance(version, str):
            version = f"version_{version}"
        parts = [str(part) for part in (logger.name, version) if part not in (None, "")]
    return _files.join(_files.absolute(root), *parts, "checkpoints")
