"""jsonargparse, which parses what the command line is given; imported only where a configuration is read."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from fulmen_protocols import MissingPackage

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

__all__ = ["ActionConfigFile", "ArgumentParser", "Namespace", "class_from_function"]

register_unresolvable_import_paths(torch)  # torch.relu and its like do not know their module
set_parsing_settings(config_read_mode_fsspec_enabled=True)
