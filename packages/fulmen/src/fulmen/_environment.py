"""Defaults of the Trainer's arguments from environment variables: ``FULMEN_TRAINER_MAX_EPOCHS=3``.

Lightning's prefix, ``PL_TRAINER_``, works too. What is passed in code wins.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

from fulmen_fabric import rank_zero_warn
from fulmen_protocols import MisconfigurationException, did_you_mean

__all__ = ["defaults_from_environment"]

F = TypeVar("F", bound=Callable[..., None])
_PREFIXES = ("FULMEN_TRAINER_", "PL_TRAINER_")


def defaults_from_environment(init: F) -> F:
    """``init``, whose arguments that nobody passes are taken from ``FULMEN_TRAINER_<ARG>`` or ``PL_TRAINER_<ARG>``.

    A value is read as a Python literal (``3``, ``0.5``, ``[0, 1]``, ``None``); what is none is text.

    Raises:
        MisconfigurationException: as ``init`` does, with the variables that the arguments in question came from.
    """
    names = tuple(signature(init).parameters)[1:]

    @wraps(init)
    def init_with_defaults(self: object, *args: Any, **kwargs: Any) -> None:
        found = _variables(names)
        taken = {name: variable for name, variable in found.items() if name not in kwargs}
        values = {name: _literal(os.environ[variable]) for name, variable in taken.items()}
        try:
            init(self, *args, **{**values, **kwargs})
        except MisconfigurationException as error:
            blamed = [name for name in taken if name in str(error)]
            if not blamed:
                raise
            where = ", ".join(f"{name} from {taken[name]}={os.environ[taken[name]]!r}" for name in blamed)
            raise type(error)(
                f"{error}\nTaken from environment variables: {where}. Change or unset them, or pass the argument."
            ) from error

    return init_with_defaults  # type: ignore[return-value]  # `wraps` keeps the signature, which mypy cannot see


def _variables(names: Iterable[str]) -> Mapping[str, str]:
    """For each argument that the environment has a value for, the variable's name. Warns of a misspelt one."""
    known = {name.upper(): name for name in names}
    found: dict[str, str] = {}
    for prefix in reversed(_PREFIXES):  # ours wins
        for variable in sorted(os.environ):
            if not variable.startswith(prefix):
                continue
            name = known.get(variable.removeprefix(prefix))
            if name is None:
                hint = did_you_mean(variable, [prefix + each for each in known])
                rank_zero_warn(f"{variable} is set, but the Trainer has no such argument: it is ignored.{hint}")
            else:
                found[name] = variable
    return found


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
