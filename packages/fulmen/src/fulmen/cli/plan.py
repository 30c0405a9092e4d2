"""``fulmen plan``: what one rank of a run needs in memory, from a shell, without the devices."""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fulmen_protocols.errors import FulmenError, MisconfigurationException, did_you_mean

if TYPE_CHECKING:  # the command line's help need not import torch
    from collections.abc import Callable, Sequence
    from types import ModuleType

    from fulmen.memory_plan import MemoryPlan
    from fulmen.module import LightningModule

__all__ = ["plan"]

_EXAMPLES = """examples:
  fulmen plan train.py:GPT --batch int64[16,1025] --devices 8 --num-nodes 8 --strategy fsdp --precision bf16-mixed
  fulmen plan package.models:ResNet --init depth=50 --batch float32[64,3,224,224],int64[64] --memory 80GiB
  fulmen plan --config config.yaml --devices 8 --strategy fsdp
"""


def plan(argv: Sequence[str]) -> int:
    """Say how much memory one rank needs, what is sharded how, and how large checkpoints are.

    Returns:
        0 when the plan was made and fits; 3 when it does not fit into --memory; 2 when the arguments are wrong, 1 when
        a library is missing.
    """
    parser = argparse.ArgumentParser(
        "fulmen plan",
        description="What one rank of a run needs in memory, what is sharded how, and how large checkpoints are. "
        "Needs neither the devices nor the other ranks: the run's own parts take a step on tensors without values.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="FILE.py:NAME", help="a LightningModule class or function; or package.module:NAME")
    add("--config", "-c", action="append", default=[], help="a configuration as for `fulmen fit`; may be repeated")
    add("--init", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the class or function")
    add(
        "--batch",
        metavar="DTYPE[N,...]",
        help="the batch of one rank: int64[16,1024] | x=float32[8,4],y=int64[8]; "
        "left out, the first batch of the model's or datamodule's training loader, or its example_input_array",
    )
    add("--batch-size", type=int, metavar="N", help="samples per rank, in place of the batch's own")
    add("--devices", type=int, help="devices of each node (1)")
    add("--num-nodes", type=int, help="nodes (1)")
    add("--strategy", help="as the Trainer's: auto, ddp, fsdp, ...")
    add("--strategy-option", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of that strategy")
    add(
        "--wrap", nargs="+", default=[], metavar="CLASS", help="layers that fsdp shards as units (its auto_wrap_policy)"
    )
    add("--precision", help="as the Trainer's: 32-true, bf16-mixed, ...")
    add("--gradient-clip-val", type=float, help="as the Trainer's")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="the kind of device planned for (cuda)")
    add(
        "--memory", metavar="SIZE", help="what each device has, as 80GiB: says whether the plan fits, or what to change"
    )
    add("--json", action="store_true", help="print the numbers as JSON")
    try:
        asked = parser.parse_args(list(argv))
    except SystemExit as stop:  # argparse has printed why
        return int(stop.code or 0)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return _plan(asked)
    except (MisconfigurationException, ValueError) as error:
        print(f"fulmen plan: {error}", file=sys.stderr)
        return 2
    except FulmenError as error:
        print(f"fulmen plan: {error}", file=sys.stderr)
        return 1


def _plan(asked: argparse.Namespace) -> int:
    from fulmen.memory_plan.report import parse_size

    if (asked.model is None) == (not asked.config):
        raise MisconfigurationException(
            f"model={asked.model!r} and --config={asked.config!r}: give one of the two, FILE.py:NAME or a file."
        )
    memory = None if asked.memory is None else parse_size(asked.memory)
    made = _from_config(asked) if asked.config else _from_class(asked)
    lines: list[str] = []
    if memory is not None:
        from fulmen.memory_plan._advice import verdict

        lines = verdict(made, memory)
    if asked.json:
        print(json.dumps({**made.to_dict(), **({"verdict": lines} if lines else {})}, indent=1))
    else:
        print(made)
        for line in lines:
            print(line)
    return 3 if memory is not None and made.excess(memory) > 0 else 0


def _trainer_arguments(asked: argparse.Namespace, units: set[object] | None = None) -> dict[str, Any]:
    """What was asked for, and nothing that would start, write or show anything."""
    from fulmen.memory_plan._fake_world import OneRankOf

    devices, nodes = asked.devices or 1, asked.num_nodes or 1
    strategy: object = asked.strategy or "auto"
    options = _pairs("--strategy-option", asked.strategy_option)
    if units:
        options["auto_wrap_policy"] = units
    if options:
        from fulmen_protocols import STRATEGIES, load

        if asked.strategy is None:
            raise MisconfigurationException(
                f"--strategy-option={asked.strategy_option!r} and --wrap={asked.wrap!r}: give --strategy too."
            )
        strategy = load(STRATEGIES, asked.strategy, **options)
    return {
        "accelerator": "cpu",
        "devices": devices,
        "num_nodes": nodes,
        "strategy": strategy,
        "precision": asked.precision,
        "gradient_clip_val": asked.gradient_clip_val,
        "plugins": [OneRankOf(devices * nodes)],
        "max_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def _from_class(asked: argparse.Namespace) -> MemoryPlan:
    from functools import partial

    from fulmen.trainer import Trainer

    named = _named(asked.model)
    made: Callable[[], LightningModule] = partial(named, **_pairs("--init", asked.init))
    units: set[object] = {
        _named(text if ":" in text else f"{asked.model.rpartition(':')[0]}:{text}") for text in asked.wrap
    }
    with _quietly():
        trainer = Trainer(**_trainer_arguments(asked, units))
    return trainer.plan(made, batch=asked.batch, batch_size=asked.batch_size, device=asked.device)


def _named(text: str) -> Callable[..., Any]:
    """The class or function behind ``FILE.py:NAME`` or ``package.module:NAME``."""
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise MisconfigurationException(f"model={text!r}: write it as FILE.py:NAME or package.module:NAME.")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise MisconfigurationException(f"model={text!r}: there is no file {place!r} in {os.getcwd()!r}.")
        module = _executed(Path(place).resolve())
    else:
        try:
            module = import_module(place)
        except ModuleNotFoundError as error:
            if error.name != place.partition(".")[0] and error.name != place:
                raise
            raise MisconfigurationException(
                f"model={text!r}: there is no module {place!r} in {os.getcwd()!r} or among what is installed."
            ) from error
    found = getattr(module, name, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise MisconfigurationException(
            f"model={text!r}: {name!r} in {place!r} is {found!r}, no class and no function.{did_you_mean(name, names)}"
        )
    return cast("Callable[..., Any]", found)


def _executed(file: Path) -> ModuleType:
    """The module in ``file``, executed once, under the name that an import of it would have."""
    known = sys.modules.get(file.stem)
    if known is not None and known.__file__ is not None and Path(known.__file__).resolve() == file:
        return known
    sys.path.insert(0, str(file.parent))  # as `python FILE.py` does
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _pairs(flag: str, texts: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise MisconfigurationException(f"{flag} got {text!r}. Write it as NAME=VALUE.")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value  # a word
    return found


def _quietly() -> Any:
    """A context in which the Trainer's line on its devices is not printed: they are those of the plan."""
    import logging
    from contextlib import contextmanager

    @contextmanager
    def quiet() -> Any:
        logger = logging.getLogger("fulmen")
        before = logger.level
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(before)

    return quiet()


def _from_config(asked: argparse.Namespace) -> MemoryPlan:
    from fulmen.cli._planning import from_config

    units: set[object] = {_named(text) for text in asked.wrap}
    wanted = _trainer_arguments(asked, units)
    given = {
        "devices": asked.devices,
        "num_nodes": asked.num_nodes,
        "precision": asked.precision,
        "gradient_clip_val": asked.gradient_clip_val,
    }
    changed = {key: value for key, value in given.items() if value is not None}
    if asked.strategy is not None:
        changed["strategy"] = wanted["strategy"]
    with _quietly():
        trainer, model, datamodule = from_config(asked.config, changed)
    return trainer.plan(
        model, batch=asked.batch, batch_size=asked.batch_size, datamodule=datamodule, device=asked.device
    )
