"""The engines of a run: each made for a module, with its optimizer or for evaluation, and taken apart again."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fulmen_deepspeed import _optimizers, _states
from fulmen_deepspeed._entry import EngineEntry, entry_of, forget_entry
from fulmen_protocols.errors import MisconfigurationException, MisconfigurationTypeError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from torch import nn
    from torch.optim import Optimizer

    from fulmen_deepspeed._process_group import ProcessGroup
    from fulmen_deepspeed._settings import Settings
    from fulmen_deepspeed.config import Config

__all__ = ["Engines"]


class Engines:
    """Modules that were placed, and what DeepSpeed has made for them.

    Args:
        settings: what engines are made with.
        group: the ranks that share an engine.
        remote_device: where stage 3 keeps parameters as modules are made.
    """

    def __init__(self, settings: Settings, group: ProcessGroup, remote_device: str | None) -> None:
        self._settings = settings
        self._group = group
        self._remote_device = remote_device
        self._library: Any = None
        self._entries: list[EngineEntry] = []

    def use(self, library: Any) -> None:
        """Make engines with ``library``: DeepSpeed, which is imported once the kind of device is known."""
        self._library = library

    def dismantle(self) -> None:
        """Take every engine apart."""
        for entry in self._entries:
            _dismantle(entry)
        self._entries = []

    def spreading(self) -> AbstractContextManager[object]:
        """Within the block each parameter is spread over the ranks as soon as it is made, as stage 3 wants it."""
        spread: AbstractContextManager[object] = self._library.zero.Init(
            enabled=True,
            remote_device=self._remote_device,
            config_dict_or_path=self._settings.for_training(self._group.device.type),
        )
        return spread

    def place(self, module: nn.Module) -> EngineEntry:
        """See ``DeepSpeedStrategy.place``."""
        before = entry_of(module)
        if before is not None:
            if before.engine is not None and before in self._entries:
                return before
            _dismantle(before)
            module = before.module
        if not _states.is_partitioned(module):
            plan = self._settings.casting.plan
            dtype = plan["parameter"] if plan["parameter"] == plan["compute"] != torch.float32 else None
            module = module.to(self._group.device, dtype)
            for tensor in (*module.parameters(), *module.buffers()):
                self._group.collectives.broadcast(tensor)
        entry = EngineEntry(module, self._settings.casting, self._group.device)
        if self._settings.stage == 3:
            entry.make_engine = partial(self._attach_for_evaluation, entry)
        self._entries.append(entry)
        return entry

    def attach_for_training(self, placed: nn.Module, optimizers: Sequence[Optimizer]) -> Sequence[Optimizer]:
        """See ``DeepSpeedStrategy.prepare_optimizers``."""
        entry = self.entry(placed)
        _optimizers.check(optimizers, entry.module, self._settings.config)
        if not optimizers and not self._settings.makes_optimizer:
            return []
        if entry.engine is not None:
            _take_down_engine(entry)
        given = next(iter(optimizers), None)
        layout = None if given is None else _optimizers.Layout.of(given)
        parameters = [parameter for parameter in entry.module.parameters() if parameter.requires_grad]
        config = self._settings.for_training(self._group.device.type)
        engine = self._make_engine(entry.module, config, parameters, given)
        entry.attach(engine, trains=True)
        checkpointing = self._settings.activation_checkpointing()
        if checkpointing is not None:
            self._library.checkpointing.configure(mpu_=None, **checkpointing)
        optimizer: Optimizer = engine.basic_optimizer
        _optimizers.adopt(optimizer, engine, layout)
        return [optimizer]

    def _attach_for_evaluation(self, entry: EngineEntry) -> None:
        config = self._settings.for_evaluation(self._group.device.type)
        entry.attach(self._make_engine(entry.module, config, [], None), trains=False)

    def _make_engine(
        self, module: nn.Module, config: Config, parameters: list[nn.Parameter], optimizer: Optimizer | None
    ) -> Any:
        device = self._group.device
        engine, _, _, _ = self._library.initialize(
            args=Namespace(device_rank=self._group.local_rank if device.type == "cpu" else device.index),
            config=config,
            model=module,
            model_parameters=parameters,
            optimizer=optimizer,
            dist_init_required=False,
        )
        return engine

    def entry(self, placed: nn.Module) -> EngineEntry:
        """The entry of a module that was placed.

        Raises:
            MisconfigurationTypeError: it was not.
        """
        entry = entry_of(placed)
        if entry is None:
            raise MisconfigurationTypeError(
                f"DeepSpeedStrategy was given a {type(placed).__name__} that it has not placed. Call place() first."
            )
        return entry

    # Any: DeepSpeed has no type information.
    def training(self, placed: nn.Module | None) -> Any:
        """The engine that trains ``placed``, or the only one there is.

        Raises:
            MisconfigurationException: none does, or nobody can tell which one is meant.
        """
        if placed is None:
            found = [entry for entry in self._entries if entry.trains]
            if len(found) != 1:
                raise MisconfigurationException(
                    f"DeepSpeedStrategy has {len(found)} engines that train, and was not told which one is meant. "
                    "Give the module."
                )
            return found[0].engine
        entry = self.entry(placed)
        if not entry.trains:
            raise MisconfigurationException(
                f"{type(entry.module).__name__} has no optimizer yet, and DeepSpeed's engine is made with it. Set both "
                "up together: model, optimizer = fabric.setup(model, optimizer)."
            )
        return entry.engine


def _dismantle(entry: EngineEntry) -> None:
    """Let go of a module: nothing of the engine stays in it but, in stage 3, its parameters' places."""
    _take_down_engine(entry)
    forget_entry(entry.module)


def _take_down_engine(entry: EngineEntry) -> None:
    engine = entry.engine
    entry.attach(None, trains=False)
    if engine is not None:
        engine.destroy()
        _states.forget_gradients(entry.module)
