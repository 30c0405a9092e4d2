"""Names that a program registers for strategies and accelerators of its own."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

import fulmen
from fulmen.accelerators import AcceleratorRegistry, CPUAccelerator
from fulmen.strategies import SingleDeviceStrategy, StrategyRegistry
from fulmen_protocols import BackendNotFound, MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Iterator


class Slow(SingleDeviceStrategy):
    def __init__(self, factor: int = 1) -> None:
        super().__init__()
        self.factor = factor


class Board(CPUAccelerator):
    """A device of one's own."""


@pytest.fixture(autouse=True)
def forgotten_afterwards() -> Iterator[None]:
    yield
    for registry, name in ((StrategyRegistry, "slow"), (StrategyRegistry, "ddp"), (AcceleratorRegistry, "board")):
        with suppress(MisconfigurationException):
            registry.remove(name)


def trainer(**options: object) -> fulmen.Trainer:
    return fulmen.Trainer(logger=False, enable_checkpointing=False, **options)  # type: ignore[arg-type]  # options of several kinds


@pytest.mark.proves("14.5")
def test_a_trainer_and_a_fabric_take_them_by_name() -> None:
    StrategyRegistry.register("slow", Slow, description="takes its time", factor=3)
    AcceleratorRegistry.register("board", Board)

    by_trainer = trainer(accelerator="board", strategy="slow")
    by_fabric = fulmen.Fabric(accelerator="board", strategy="slow")

    assert isinstance(by_trainer.strategy, Slow)
    assert by_trainer.strategy.backend.factor == 3
    assert isinstance(by_trainer.accelerator, Board)
    assert isinstance(by_fabric.strategy, Slow)
    assert StrategyRegistry.get("slow") is not StrategyRegistry.get("slow"), "each run has its own"
    assert "slow" in StrategyRegistry.available_strategies()
    assert {"board", "cpu"} <= set(AcceleratorRegistry.available_accelerators())


@pytest.mark.proves("14.5")
def test_it_decorates_and_names_of_installed_packages_are_there_too() -> None:
    @StrategyRegistry.register("slow")
    def make() -> Slow:
        return Slow(7)

    assert isinstance(make(), Slow)
    assert trainer(accelerator="cpu", strategy="slow").strategy.backend.factor == 7
    assert "ddp" in StrategyRegistry
    assert type(StrategyRegistry.get("single_device")) is SingleDeviceStrategy
    assert type(AcceleratorRegistry.get("cpu")) is CPUAccelerator
    assert StrategyRegistry.get("nowhere", StrategyRegistry.get("slow")).factor == 7


@pytest.mark.proves("14.5")
def test_a_name_that_is_taken_is_taken_over_only_on_purpose() -> None:
    with pytest.raises(MisconfigurationException, match=r"strategy named 'ddp' is there already.*override=True"):
        StrategyRegistry.register("ddp", Slow)
    StrategyRegistry.register("ddp", Slow, override=True)
    assert isinstance(trainer(accelerator="cpu", strategy="ddp").strategy, Slow)
    StrategyRegistry.remove("ddp")
    assert not isinstance(trainer(accelerator="cpu", strategy="ddp").strategy, Slow)


def test_names_that_nobody_gave_are_errors() -> None:
    with pytest.raises(BackendNotFound, match="no strategy is named 'slow'"):
        StrategyRegistry.get("slow")
    with pytest.raises(MisconfigurationException, match=r"registered no accelerator 'cpu', only \[\].*installed"):
        AcceleratorRegistry.remove("cpu")
    with pytest.raises(MisconfigurationException, match=r"strategy name='' is not a name\. Pass a text"):
        StrategyRegistry.register("", Slow)
