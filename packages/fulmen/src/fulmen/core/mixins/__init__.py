"""``HyperparametersMixin``, where Lightning has it."""

from typing import TYPE_CHECKING

from fulmen._not_here import submodule
from fulmen.hparams import HyperparametersMixin

__all__ = ["HyperparametersMixin"]


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        return submodule("fulmen.core.mixins", name)
