"""``fulmen fit|validate|test|predict``: LightningCLI in a shell, with every class chosen by arguments and files.

Nothing heavy is imported before the configuration has been looked at: a wrong file is reported at once.
"""

from __future__ import annotations

import ast
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

from fulmen_protocols.errors import FulmenError, MisconfigurationException, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["fit", "predict", "test", "validate"]

_KEYS = ("config", "data", "lr_scheduler", "model", "optimizer", "seed_everything", "trainer")
_OWN_KEYS = {
    "fit": ("ckpt_path", "weights_only"),
    "validate": ("ckpt_path", "verbose", "weights_only"),
    "test": ("ckpt_path", "verbose", "weights_only"),
    "predict": ("ckpt_path", "return_predictions", "weights_only"),
}


def fit(argv: Sequence[str]) -> int:
    """Train the model that --model or a configuration names."""
    return _run("fit", argv)


def validate(argv: Sequence[str]) -> int:
    """Run one validation epoch with the model that --model or a configuration names."""
    return _run("validate", argv)


def test(argv: Sequence[str]) -> int:
    """Run one test epoch with the model that --model or a configuration names."""
    return _run("test", argv)


def predict(argv: Sequence[str]) -> int:
    """Predict with the model that --model or a configuration names."""
    return _run("predict", argv)


def _run(subcommand: str, argv: Sequence[str]) -> int:
    """Look at the configuration, build, run.

    Returns:
        0 when it ran; 2 when the arguments or the configuration are wrong, 1 when a library is missing.
    """
    # As with `python -m`, modules of the folder that one works in can be named.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        arguments, modules = _without_imports(argv)
        for path in _config_files(arguments):
            _check_file(subcommand, path)
        for module in modules:
            _import(module)
        from fulmen.cli._shell import build

        start = build(subcommand, arguments)
    except SystemExit as stop:  # the parser has printed help, a configuration, or what is wrong
        return int(stop.code or 0)
    except MisconfigurationException as error:
        print(f"fulmen {subcommand}: {error}", file=sys.stderr)
        return 2
    except FulmenError as error:
        print(f"fulmen {subcommand}: {error}", file=sys.stderr)
        return 1
    start()
    return 0


def _without_imports(argv: Iterable[str]) -> tuple[list[str], list[str]]:
    """The arguments without ``--import MODULE``, and the modules."""
    arguments: list[str] = []
    modules: list[str] = []
    words = iter(argv)
    for word in words:
        if word.startswith("--import="):
            modules.append(word.partition("=")[2])
        elif word == "--import":
            modules.append(next(words, ""))
        else:
            arguments.append(word)
    return arguments, modules


def _import(module: str) -> None:
    try:
        import_module(module)
    except (ModuleNotFoundError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != module.partition(".")[0]:
            raise  # the module is there, and something that it imports is not: its traceback says what
        raise MisconfigurationException(
            f"--import={module!r}: there is no such module in {os.getcwd()!r} or among what is installed. "
            "Give a module's name, such as package.module."
        ) from error


def _config_files(arguments: Sequence[str]) -> list[str]:
    """The local files that ``--config`` names; a URL, or a configuration written out, is left to the parser."""
    named: list[str] = []
    for index, word in enumerate(arguments):
        if word in ("--config", "-c") and index + 1 < len(arguments):
            named.append(arguments[index + 1])
        elif word.startswith("--config="):
            named.append(word.partition("=")[2])
    return [one for one in named if "://" not in one and not one.lstrip().startswith("{") and "\n" not in one]


def _check_file(subcommand: str, path: str) -> None:
    """Raise if a configuration file is missing, no YAML, or has keys that no run has."""
    if not os.path.isfile(path):
        raise MisconfigurationException(f"--config={path!r}: there is no such file in {os.getcwd()!r}.")
    if not path.endswith((".yaml", ".yml", ".json")):
        return
    if find_spec("yaml") is None:
        return  # the parser's own check names what to install
    import yaml

    try:
        with open(path, encoding="utf-8") as stream:
            content: object = yaml.safe_load(stream)
    except yaml.YAMLError as error:
        raise MisconfigurationException(f"--config={path!r} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise MisconfigurationException(
            f"--config={path!r} holds {content!r:.60}, and no configuration. Write keys such as model: and trainer:"
        )
    keys = cast("dict[str, Any]", content)
    _check_keys(path, "", keys, (*_KEYS, *_OWN_KEYS[subcommand]))
    trainer = keys.get("trainer")
    if isinstance(trainer, dict):
        _check_keys(path, "trainer.", cast("dict[str, Any]", trainer), _trainer_arguments())


def _check_keys(path: str, prefix: str, keys: Iterable[str], known: Sequence[str]) -> None:
    for key in keys:
        if key.partition(".")[0].rstrip("+") not in known:
            hint = did_you_mean(key, known)
            raise MisconfigurationException(
                f"--config={path!r} has the key {prefix + key!r}, which is not known.{hint} "
                f"Known are {', '.join(sorted(known))}."
            )


def _trainer_arguments() -> list[str]:
    """The names of the Trainer's arguments, from its source: importing it would import torch."""
    spec = find_spec("fulmen.trainer.trainer")
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin, encoding="utf-8") as stream:
        tree = ast.parse(stream.read())
    cls = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Trainer")
    init = next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    return [argument.arg for argument in (*init.args.args[1:], *init.args.kwonlyargs)]
