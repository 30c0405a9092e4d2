"""A package of Lightning's, for the samplers in it; torch does the rest."""

from typing import TYPE_CHECKING

from fulmen._not_here import submodule

if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        return submodule("fulmen.overrides", name)
