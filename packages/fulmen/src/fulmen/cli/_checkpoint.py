"""``--ckpt_path``: the hyperparameters in a checkpoint complete the configuration of the module."""

from __future__ import annotations

from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fulmen import _instantiator
from fulmen._jsonargparse import Namespace
from fulmen_protocols import CHECKPOINT_IOS, MisconfigurationException, load

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from fulmen.cli.parser import LightningArgumentParser

__all__ = ["merge_hyperparameters"]


def merge_hyperparameters(
    parser: LightningArgumentParser, config: Namespace, subcommand: str, module_class: type
) -> Namespace:
    """The configuration, with what the checkpoint of ``--ckpt_path`` was made with in place of what was given.

    Only a file is read: ``"best"`` and ``"last"`` are known when the run begins.

    Args:
        parser: the main parser.
        config: what was parsed.
        subcommand: its part of the configuration gets them.
        module_class: the module's class, or a base class of it.

    Raises:
        MisconfigurationException: they do not fit the module.
        CheckpointUnsafe: they name code that is not imported, and ``--weights_only=false`` was not given.
    """
    path = cast("str | PathLike[str] | None", config[subcommand].get("ckpt_path"))
    if not path or not Path(path).is_file():
        return config
    trusted = config[subcommand].get("weights_only") is False
    checkpoint = load(CHECKPOINT_IOS, "torch").load_checkpoint(path, weights_only=not trusted)
    hparams = dict(cast("Mapping[str, Any]", checkpoint.get("hyper_parameters") or {}))
    if not hparams:
        return config
    if not trusted:
        _instantiator.refuse_foreign_code(module_class, hparams, f"ckpt_path={fspath(path)!r}")
    class_path, arguments = _instantiator.split(hparams)
    name = checkpoint.get("hparams_name")
    if isinstance(name, str) and name != "kwargs":
        arguments = {name: arguments}  # they were saved as one configuration object
    model: dict[str, Any] = arguments
    if class_path is not None:
        model = {"class_path": class_path, "dict_kwargs": arguments}
    else:
        current = config[subcommand].get("model")
        if isinstance(current, Namespace) and "class_path" in current:
            # They were saved without the command line; the class is the one that was chosen.
            model = {"class_path": current.class_path, "init_args": arguments}
    exits, parser.exit_on_error = parser.exit_on_error, False
    try:
        merged: Namespace = parser.parse_object({"subcommand": subcommand, subcommand: {"model": model}}, config)
    except Exception as error:
        raise MisconfigurationException(
            f"--ckpt_path={fspath(path)!r} holds hyperparameters {sorted(arguments)!r} that do not fit the model: "
            f"{error}"
        ) from error
    finally:
        parser.exit_on_error = exits
    return merged
