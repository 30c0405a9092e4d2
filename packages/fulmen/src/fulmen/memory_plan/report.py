"""MemoryPlan: the numbers of a plan, and how they are printed. No torch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["MemoryPlan", "ParameterGroup", "in_units", "parse_size"]

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters of one kind: equal names but for numbers, equal shapes, equal placement."""

    name: str
    """With ``*`` in place of the numbers in which the names differ."""
    count: int
    shape: tuple[int, ...]
    """The whole parameter's, over all ranks."""
    dtype: str
    """As it is stored, for example ``"float32"``."""
    placement: str
    """How it is spread over the mesh, for example ``"Shard(0)"``; ``"whole"`` on every rank."""
    trainable: bool
    local_bytes: int
    """Of all ``count`` parameters on rank 0."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What rank 0 needs, in bytes; where ranks differ, it holds the largest shards.

    The step that is planned is one in the middle of a run: the optimizer's state exists already.
    """

    model: str
    strategy: str
    precision: str
    device: str
    """The kind of device that is planned for: ``"cuda"`` or ``"cpu"``."""
    world_size: int
    mesh: str
    """Dimensions of the device mesh and their sizes; empty without one."""
    batch: str
    """The batch of one rank, as dtypes and shapes."""
    parameter_count: int
    """Elements of all parameters, over all ranks; a shared parameter counts once."""
    trainable_count: int
    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass has left for the backward pass when that begins, the batch not counted."""
    communication: int
    """The most that buffers of all-gather, reduce-scatter and gradient buckets take at one time."""
    peak: int
    """The most that is allocated at one time within a training step."""
    peak_during: str
    """``"forward"``, ``"backward"`` or ``"optimizer step"``."""
    at_peak: Mapping[str, int]
    """What the peak consists of: bytes by purpose."""
    groups: tuple[ParameterGroup, ...]
    checkpoint: int
    """Weights, persistent buffers and optimizer state of the whole model: one file."""
    checkpoint_per_rank: int
    """The part of them that rank 0 writes into a sharded checkpoint."""
    notes: tuple[str, ...] = ()
    """What had to be assumed."""

    def to_dict(self) -> dict[str, object]:
        """All numbers, as plain data."""
        return asdict(self)

    def excess(self, memory: int) -> int:
        """By how many bytes the peak is above ``memory``; negative where it fits."""
        return self.peak - memory

    def __str__(self) -> str:
        """The tables that ``fulmen plan`` prints."""
        whole = f"{self.parameter_count:,} parameters"
        if self.trainable_count != self.parameter_count:
            whole += f", {self.trainable_count:,} of them trained"
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        mesh = f" on the mesh {self.mesh}" if self.mesh else ""
        lines = [
            f"{self.model}: {whole}",
            f"{ranks} of {self.device}{mesh}, strategy {self.strategy}, precision {self.precision}",
            f"batch of one rank: {self.batch}",
            "",
            *_table(
                ["memory of one rank", "bytes", ""],
                [
                    _row("parameters", self.parameters),
                    _row("buffers", self.buffers),
                    _row("gradients", self.gradients),
                    _row("optimizer state", self.optimizer),
                    _row("activations for the backward pass", self.activations),
                    _row("communication buffers, at most", self.communication),
                    _row(f"peak, in the {self.peak_during}", self.peak),
                ],
            ),
            "",
            *_table(
                [f"the peak, in the {self.peak_during}", "bytes", ""],
                [_row(name, size) for name, size in self.at_peak.items() if size],
            ),
            "",
            *_table(
                ["parameters", "", "shape", "dtype", "placement", "on one rank"],
                [
                    [
                        group.name,
                        f"x{group.count}" if group.count > 1 else "",
                        "x".join(map(str, group.shape)) or "scalar",
                        group.dtype if group.trainable else f"{group.dtype}, frozen",
                        group.placement,
                        in_units(group.local_bytes),
                    ]
                    for group in self.groups
                ],
            ),
            "",
            f"checkpoint: {in_units(self.checkpoint)} in all, {in_units(self.checkpoint_per_rank)} of one rank",
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def parse_size(text: str) -> int:
    """Bytes of a text such as ``"80GiB"``, ``"40 GB"`` or ``"123456"``.

    Raises:
        MisconfigurationException: it is no size.
    """
    units = {**_UNITS, **_DECIMAL}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match:
        wanted = match[2].lower() or "b"
        for unit, size in units.items():
            if unit.lower() == wanted and float(match[1]) > 0:
                return int(float(match[1]) * size)
    raise MisconfigurationException(
        f"--memory={text!r} is no amount of memory. Write a positive number and one of {', '.join(units)}: 80GiB."
    )


def in_units(size: float) -> str:
    """``size`` bytes for people: three digits and a unit."""
    unit = next((name for name, bound in reversed(_UNITS.items()) if abs(size) >= bound), "B")
    value = size / _UNITS[unit]
    return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}" if abs(value) < 1000 else f"{value:.0f} {unit}"


def _row(name: str, size: int) -> list[str]:
    return [name, f"{size:,}", in_units(size)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    text = {0, 2, 3, 4} if len(head) == 6 else {0}

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if column in text else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return [line(head), "  ".join("-" * width for width in widths), *map(line, rows)]
