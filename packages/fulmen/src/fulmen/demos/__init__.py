"""Small modules and data sets for trying things out, for bug reports and for the tests of other projects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._not_here import submodule

if TYPE_CHECKING:
    from fulmen.demos.boring_classes import BoringDataModule as BoringDataModule
    from fulmen.demos.boring_classes import BoringModel as BoringModel
    from fulmen.demos.boring_classes import DemoModel as DemoModel
    from fulmen.demos.lstm import LightningLSTM as LightningLSTM
    from fulmen.demos.lstm import SequenceSampler as SequenceSampler
    from fulmen.demos.lstm import SimpleLSTM as SimpleLSTM
    from fulmen.demos.text import WikiText2 as WikiText2
    from fulmen.demos.transformer import LightningTransformer as LightningTransformer
    from fulmen.demos.transformer import Transformer as Transformer

_HOME = {
    "BoringDataModule": "boring_classes",
    "BoringModel": "boring_classes",
    "DemoModel": "boring_classes",
    "LightningLSTM": "lstm",
    "LightningTransformer": "transformer",
    "SequenceSampler": "lstm",
    "SimpleLSTM": "lstm",
    "Transformer": "transformer",
    "WikiText2": "text",
}

__all__ = [
    "BoringDataModule",
    "BoringModel",
    "DemoModel",
    "LightningLSTM",
    "LightningTransformer",
    "SequenceSampler",
    "SimpleLSTM",
    "Transformer",
    "WikiText2",
]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _HOME:
            value: object = getattr(import_module(f"fulmen.demos.{_HOME[name]}"), name)
            globals()[name] = value
            return value
        return submodule("fulmen.demos", name)


def __dir__() -> list[str]:
    return sorted(__all__)
