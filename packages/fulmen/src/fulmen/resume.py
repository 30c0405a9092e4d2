"""Resume: what of a checkpoint a run takes over, where that is not everything."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, final

from fulmen_fabric import rank_zero_info
from fulmen_protocols import MisconfigurationException
from fulmen_protocols.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.optim import Optimizer

__all__ = ["EVERYTHING", "Resume", "options", "tell"]

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

    def change(self, optimizers: Sequence[Optimizer], *, scheduled: bool) -> None:
        """Put the options of ``override`` into every parameter group.

        Args:
            optimizers: restored ones.
            scheduled: whether schedulers were restored, which set learning rates.

        Raises:
            MisconfigurationException: a group has no such option, or a scheduler would undo the change.
        """
        if "lr" in self.override and scheduled:
            raise MisconfigurationException(
                f"Resume(override={{'lr': {self.override['lr']!r}}}): the schedulers of the checkpoint set 'lr' anew. "
                "Leave 'schedulers' out of parts, so that those of configure_optimizers begin with that rate."
            )
        for index, optimizer in enumerate(optimizers):
            for group in optimizer.param_groups:
                for name, value in self.override.items():
                    if name not in group or name == "params":
                        known = sorted(set(group) - {"params"})
                        raise MisconfigurationException(
                            f"Resume(override={{{name!r}: {value!r}}}): optimizer {index} "
                            f"({type(optimizer).__name__}) has no option {name!r}.{did_you_mean(name, known)} It has: "
                            f"{', '.join(known)}."
                        )
                    group[name] = value


EVERYTHING: Final = Resume("everything")


def options(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """The options of every parameter group, one after the other, each with its ``place``."""
    return [
        {"place": f"optimizer {index}, group {number}", **{k: v for k, v in group.items() if k != "params"}}
        for index, optimizer in enumerate(optimizers)
        for number, group in enumerate(optimizer.param_groups)
    ]


def tell(
    resume: Resume, path: str | None, code: list[dict[str, Any]], file: list[dict[str, Any]], now: list[dict[str, Any]]
) -> None:
    """Log what a fit took from where: ``code``, ``file`` and ``now`` are options before, with and after loading."""
    from_code = [part for part in PARTS if not resume.takes(part)]
    lines = [
        f"resumed a part of {path}: {', '.join(part for part in PARTS if resume.takes(part))}; from the code: "
        f"{', '.join(from_code) or 'nothing'}"
    ]
    for mine, theirs, kept in zip(code, file, now, strict=True):
        for name, value in kept.items():
            if mine.get(name) != value or theirs.get(name) != value:
                source = "override" if theirs.get(name) != value else "the checkpoint"
                lines.append(
                    f"  {kept['place']}: {name} is {value!r}, by {source} (the checkpoint has {theirs.get(name)!r}, "
                    f"the code {mine.get(name)!r})"
                )
    rank_zero_info("\n".join(lines))
