"""Resume: what of a checkpoint a run takes over, where that is not everything."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, final

from fulmen_protocols import MisconfigurationException
from fulmen_protocols.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Resume"]

PARTS: Final = ("weights", "optimizers", "schedulers", "progress", "callbacks", "data", "precision")


@final
class Resume:
    """A checkpoint of which a call takes only some parts, or changes some values: ``fit(ckpt_path=Resume(...))``.

    What was taken from the file, what comes from the code, and each option of an optimizer in which the two differ is
    logged, in one message.

    Args:
        path: whatever ``ckpt_path`` may be: a path or URL, ``"last"``, ``"best"``.
        parts: some of

            - ``weights``: the module's ``state_dict``;
            - ``optimizers``: their states and options;
            - ``schedulers``: of learning rates; only together with the optimizers;
            - ``progress``: epochs and steps, the position in the data, random states, metrics, gradients of an open
              accumulation window. Without it the run counts from 0;
            - ``callbacks``: their states, and their ``on_load_checkpoint``;
            - ``data``: the data module's state;
            - ``precision``: the gradient scaler's state.
        override: options of the optimizers' parameter groups (``{"lr": 1e-4}``) that replace those of the file.

    Raises:
        MisconfigurationException: a part is unknown, or the arguments contradict each other.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        parts: Iterable[str] = PARTS,
        override: Mapping[str, object] | None = None,
    ) -> None:
        self.path = os.fspath(path)
        self.parts = frozenset([parts] if isinstance(parts, str) else parts)
        self.override = dict(override or {})
        for part in sorted(self.parts.difference(PARTS)):
            raise MisconfigurationException(
                f"Resume(parts=...) holds {part!r}.{did_you_mean(part, PARTS)} There are: {', '.join(PARTS)}."
            )
        if not self.parts:
            raise MisconfigurationException("Resume(parts=()) takes nothing. Leave ckpt_path out to begin anew.")
        if self.takes("schedulers") and not self.takes("optimizers"):
            raise MisconfigurationException(
                "Resume(parts=...) holds 'schedulers' without 'optimizers', whose learning rates they go on from. Take "
                "both or neither."
            )
        if self.override and not self.takes("optimizers"):
            raise MisconfigurationException(
                f"Resume(override={self.override!r}) changes options of the checkpoint's optimizers, and parts leaves "
                "those out. Set the options in configure_optimizers."
            )

    def __fspath__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        parts = [part for part in PARTS if part in self.parts]
        return f"Resume({self.path!r}, parts={parts!r}, override={self.override!r})"

    def takes(self, part: str) -> bool:
        """Whether ``part`` comes from the checkpoint."""
        return part in self.parts
