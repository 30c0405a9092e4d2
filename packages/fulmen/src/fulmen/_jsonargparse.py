"""jsonargparse, which parses what the command line is given; imported only where a configuration is read."""

from __future__ import annotations

import inspect
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from fulmen_protocols import MissingPackage

if TYPE_CHECKING:
    from collections.abc import Sequence

# The extra also brings what jsonargparse reads docstrings and stubs with; without it, help and types would be poorer.
if missing := [name for name in ("jsonargparse", "docstring_parser", "typeshed_client", "yaml") if not find_spec(name)]:
    raise MissingPackage(
        f"fulmen.cli needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. "
        "Get it with: pip install 'fulmen[cli]'"
    )

import jsonargparse
from jsonargparse import (
    ArgumentParser,
    Namespace,
    register_unresolvable_import_paths,
    set_parsing_settings,
)
from jsonargparse.typing import class_from_function

ActionConfigFile = jsonargparse.ActionConfigFile  # type: ignore[attr-defined]  # pyright: ignore[reportPrivateImportUsage]

__all__ = ["ActionConfigFile", "ArgumentParser", "Namespace", "class_from_function", "instantiate"]

register_unresolvable_import_paths(torch)  # torch.relu and its like do not know their module
set_parsing_settings(config_read_mode_fsspec_enabled=True)


def instantiate(parser: ArgumentParser, config: Namespace, builders: Sequence[tuple[Any, type, bool]]) -> Namespace:
    """The configuration with objects in it.

    Args:
        parser: what read it.
        config: what it read.
        builders: for each: what makes the object, of which class, and whether of its subclasses too.
    """
    if "instantiators" in inspect.signature(parser.instantiate).parameters:
        built: Namespace = parser.instantiate(config, instantiators=list(builders) or None)
        return built
    with warnings.catch_warnings():  # before 4.53 there is only the way that is deprecated since
        warnings.simplefilter("ignore", DeprecationWarning)
        for builder in builders:
            parser.add_instantiator(*builder)
    plain: Namespace = parser.instantiate(config)
    return plain
