"""How ranks that log different metrics agree on one fixed-shape message."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fulmen_protocols.errors import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fulmen._metric_entry import Row, Scalar
    from fulmen_protocols.collectives import Collectives

__all__ = ["Schema"]


class Schema:
    """The list of metrics that every rank puts into its message, in one order.

    A message holds ``1 + 2 * len(rows)`` numbers: whether this rank knows a metric that is not in the schema, then a
    weight (0: this rank has no value) and a value for each metric. Its shape is a function of the schema alone, which
    is the same on every rank, so no rank waits for a message that another does not send.
    """

    __slots__ = ("_collectives", "_device", "_dtype", "_index", "_same_data", "rows")

    def __init__(self, collectives: Collectives, device: torch.device, data_parts: Sequence[int] | None = None) -> None:
        """``data_parts``: which part of the data each rank reads; None where every rank reads its own."""
        self._collectives = collectives
        self._same_data: list[list[int]] | None = None
        if data_parts is not None:
            self._same_data = [
                [rank for rank, part in enumerate(data_parts) if part == one] for one in sorted(set(data_parts))
            ]
        self._device = device
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._index: dict[tuple[str, str, int], int] = {}
        self.rows: tuple[Row, ...] = ()

    def __contains__(self, identity: tuple[str, str, int]) -> bool:
        return identity in self._index

    def exchange(self, mine: Sequence[Row]) -> None:
        """Extend the schema by what any rank knows. Blocks; called by all ranks at the same point.

        Raises:
            MisconfigurationException: two ranks log a metric with different reductions. Raised on every rank.
        """
        rows = {row.identity: row for row in self.rows}
        for rank, theirs in enumerate(self._collectives.all_gather_object(list(mine))):
            for row in theirs:
                known = rows.setdefault(row.identity, row)
                same = (known.options.op, known.options.metric_attribute is None) == (
                    row.options.op,
                    row.options.metric_attribute is None,
                )
                if not same:
                    raise MisconfigurationException(
                        f"metric {row.name!r}, logged with sync_dist=True in {row.hook}, is reduced by "
                        f"{row.options.op!r} on rank {rank} and by {known.options.op!r} on a lower rank: use the same "
                        "reduce_fx on every rank."
                    )
        self.rows = tuple(rows[identity] for identity in sorted(rows))
        self._index = {row.identity: index for index, row in enumerate(self.rows)}

    def ask_devices(self, mine: bool) -> bool:
        """Whether any rank says yes, by a collective that the host reads: it waits for the device."""
        return bool(self._collectives.all_gather(torch.tensor([mine], dtype=self._dtype, device=self._device)).any())

    def only_once(self, weights: Tensor) -> Tensor:
        """``weights``, shape ``(world_size, n)``, with 0 where a lower rank tells of the same data. No host read.

        Ranks of one model (tensor parallel) log the same values; where only some have one, the first of those counts.
        """
        if self._same_data is None:
            return weights
        there = torch.zeros_like(weights, dtype=torch.bool)
        for ranks in self._same_data:
            mine = weights[ranks] != 0
            there[ranks] = mine & (mine.cumsum(0) == 1)
        return weights.masked_fill(~there, 0.0)

    def gather(self, *, changed: bool, mine: Mapping[tuple[str, str, int], tuple[Scalar, float]]) -> Tensor:
        """One collective: every rank's message, shape ``(world_size, 1 + 2 * len(rows))``. No host read.

        Args:
            changed: this rank knows metrics that the schema lacks.
            mine: ``(value, weight)`` of each metric of the schema that this rank has.
        """
        count = len(self.rows)
        host = [0.0] * (1 + 2 * count)
        host[0] = float(changed)
        tensors: list[tuple[int, Tensor]] = []
        for identity, (value, weight) in mine.items():
            index = self._index[identity]
            host[1 + index] = weight
            if isinstance(value, Tensor):
                tensors.append((1 + count + index, value))
            else:
                host[1 + count + index] = value
        message = torch.tensor(host, dtype=self._dtype).to(self._device, non_blocking=True)
        for index, value in tensors:
            message[index] = value.to(self._device, non_blocking=True)
        return self._collectives.all_gather(message)
