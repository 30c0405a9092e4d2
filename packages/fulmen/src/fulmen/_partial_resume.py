"""Taking a part of a checkpoint: other options for its optimizers, and the message that tells what came from where."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from fulmen.resume import PARTS, Resume
from fulmen_fabric import rank_zero_info
from fulmen_protocols import MisconfigurationException
from fulmen_protocols.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

__all__ = ["EVERYTHING", "change", "mention", "options", "tell"]

EVERYTHING: Final = Resume("everything")
_MOVED: Final = frozenset({"lr", "momentum", "betas"})


def change(resume: Resume, optimizers: Sequence[Optimizer], *, scheduled: bool) -> None:
    """Put the options of ``resume.override`` into every parameter group.

    Args:
        resume: what the user asked for.
        optimizers: restored ones.
        scheduled: whether schedulers were restored, which set learning rates.

    Raises:
        MisconfigurationException: a group has no such option, or a scheduler would undo the change.
    """
    if "lr" in resume.override and scheduled:
        raise MisconfigurationException(
            f"Resume(override={{'lr': {resume.override['lr']!r}}}): the schedulers of the checkpoint set 'lr' anew. "
            "Leave 'schedulers' out of parts, so that those of configure_optimizers begin with that rate."
        )
    for index, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for name, value in resume.override.items():
                if name not in group or name == "params":
                    known = sorted(set(group) - {"params"})
                    raise MisconfigurationException(
                        f"Resume(override={{{name!r}: {value!r}}}): optimizer {index} "
                        f"({type(optimizer).__name__}) has no option {name!r}.{did_you_mean(name, known)} It has: "
                        f"{', '.join(known)}."
                    )
                group[name] = value


def options(optimizers: Sequence[Optimizer]) -> list[dict[str, Any]]:
    """The options of every parameter group, one after the other, each with its ``place``."""
    return [
        {"place": f"optimizer {index}, group {number}", **{k: v for k, v in group.items() if k != "params"}}
        for index, optimizer in enumerate(optimizers)
        for number, group in enumerate(optimizer.param_groups)
    ]


def mention(path: str | None, code: list[dict[str, Any]], file: list[dict[str, Any]], *, scheduled: bool) -> None:
    """Log the options in which a whole checkpoint has changed what the code asked for; nothing if there are none.

    Args:
        path: of the checkpoint.
        code: options before loading.
        file: options after it.
        scheduled: whether schedulers were restored, too: what these move is another number at each step, and only
            where it began is compared.
    """
    moved = _MOVED if scheduled else frozenset[str]()
    lines = [
        f"  {theirs['place']}: {name} is {theirs[name]!r}, the code has {value!r}"
        for mine, theirs in zip(code, file, strict=False)  # a callback may have groups of its own brought back
        for name, value in mine.items()
        if name in theirs and name not in moved and _differs(value, theirs[name])
    ]
    if lines:
        title = f"resumed {path}, whose optimizers go on with other options than the code gives; fulmen.Resume can "
        rank_zero_info("\n".join([title + "leave them out or override them", *lines]))


def _differs(one: object, other: object) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False  # to compare them a device would be waited for
    return one != other


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
