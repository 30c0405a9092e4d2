"""The attribute that a tuner reads and writes: of the module, of the datamodule, and in the hyperparameters of both."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import TYPE_CHECKING, Any, cast

from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from fulmen.datamodule import LightningDataModule
    from fulmen.module import LightningModule

__all__ = ["Attribute", "find"]


class MissingAttribute(MisconfigurationException, AttributeError):
    """Nobody has the attribute; Lightning's learning-rate finder raises an ``AttributeError`` there."""


class Attribute:
    """One attribute, wherever it is held. All holders are written together.

    Args:
        name: of the attribute.
        holders: objects that have it, or mappings that hold it; the last one's value counts.
    """

    def __init__(self, name: str, holders: list[Any]) -> None:
        self.name, self._holders = name, holders
        self._before = [_get(holder, name) for holder in holders]

    @property
    def value(self) -> Any:
        """The value now."""
        return _get(self._holders[-1], self.name)

    def set(self, value: object) -> None:
        """Write it to every holder."""
        for holder in self._holders:
            _set(holder, self.name, value)

    def restore(self) -> None:
        """Give every holder back what it had when it was found."""
        for holder, value in zip(self._holders, self._before, strict=True):
            _set(holder, self.name, value)

    @property
    def is_held_twice(self) -> bool:
        """Whether the module and its own hyperparameters both have it."""
        return len(self._holders) > 1 and isinstance(self._holders[1], MutableMapping)


def find(
    names: Iterable[str], module: LightningModule, datamodule: LightningDataModule | None, *, flag: str
) -> Attribute:
    """The first of ``names`` that the module, the datamodule or their ``hparams`` have.

    Args:
        names: in the order of preference.
        module: looked at first.
        datamodule: of the run, if it has one.
        flag: the argument with which the user can name another one.

    Raises:
        MisconfigurationException: nobody has any of them; an ``AttributeError``, too.
    """
    names = list(names)
    for name in names:
        holders = [holder for owner in (module, datamodule) if owner is not None for holder in _holders(owner, name)]
        if holders:
            return Attribute(name, holders)
    asked = " or ".join(map(repr, names))
    places = type(module).__name__ if datamodule is None else f"{type(module).__name__}, {type(datamodule).__name__}"
    raise MissingAttribute(
        f"{flag} needs an attribute {asked}, and neither {places} nor hparams has one. Set it in __init__, or name "
        f"another one with {flag}."
    )


def _holders(owner: Any, name: str) -> list[Any]:
    found: list[Any] = []
    of_class: object = getattr(cast("type[object]", type(owner)), name, None)
    reads_only = isinstance(of_class, property) and of_class.fset is None  # it shows what hparams or another one holds
    if hasattr(owner, name) and not reads_only:
        found.append(owner)
    hparams = owner.hparams
    if name in hparams:
        found.append(hparams)
    return found


def _get(holder: Any, name: str) -> Any:
    if isinstance(holder, MutableMapping):
        return cast("MutableMapping[str, Any]", holder)[name]
    return getattr(holder, name)


def _set(holder: Any, name: str, value: object) -> None:
    if isinstance(holder, MutableMapping):
        holder[name] = value
    else:
        setattr(holder, name, value)
