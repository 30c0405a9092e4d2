"""State of a pipeline, whose stages are modules of their own: joined on rank 0, and given back to each stage.

Names are kept: stages must not share one. An optimizer's parameters are numbered through all stages, in their order, as
one process numbers the parameters of the whole model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from fulmen_protocols.errors import MisconfigurationException
from fulmen_strategies._sharded.gradients import total_norm
from fulmen_strategies._sharded.layout import local
from fulmen_strategies.collectives import TorchCollectives

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Stages", "stage_group"]


class Stages:
    """The stages of one pipeline for each place of the other dimensions.

    Args:
        mesh: with the dimension ``"pipeline_parallel"`` first.
        collectives: among all ranks.
        of_stage: among the ranks that hold this rank's stage.
        device: of this process.
    """

    def __init__(
        self, mesh: DeviceMesh, collectives: TorchCollectives, of_stage: TorchCollectives, device: torch.device
    ) -> None:
        self._everyone = collectives
        self._of_stage = of_stage
        self._along = TorchCollectives(device, mesh.get_group("pipeline_parallel"))
        self._firsts = cast("list[int]", mesh.mesh.reshape(mesh.size(0), -1)[:, 0].tolist())
        self.index = mesh.get_local_rank("pipeline_parallel")
        """Which stage this rank holds."""

    def join_states(self, state: dict[str, Any]) -> dict[str, Any]:
        """On rank 0 the entries of all stages, each whole on the first rank of its stage; elsewhere nothing.

        Raises:
            MisconfigurationException: two stages have an entry of the same name.
        """
        joined: dict[str, Any] = {}
        for stage, found in enumerate(self._on_rank_zero(state)):
            same = sorted(joined.keys() & found.keys())
            if same:
                raise MisconfigurationException(
                    f"stage {stage} of the pipeline and an earlier one both have {same[0]!r}, so one checkpoint cannot "
                    "hold them: give their layers the names that they have in the whole model."
                )
            joined.update(found)
        return joined

    def own_part(self, state: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
        """Of a joined state on rank 0, on the first rank of each stage what that stage has a place for."""
        everything = dict(self._everyone.broadcast_object(dict(state)))
        return {name: value for name, value in everything.items() if name in names} if self.is_first else {}

    def join_optimizers(self, state: dict[str, Any]) -> dict[str, Any]:
        """On rank 0 the optimizer states of all stages as one; elsewhere nothing.

        Raises:
            MisconfigurationException: stages have different numbers of parameter groups.
        """
        found = self._on_rank_zero(state)
        if not found:
            return {}
        counts = [len(one["param_groups"]) for one in found]
        if len(set(counts)) > 1:
            raise MisconfigurationException(
                f"the optimizers of the pipeline's stages have {counts} parameter groups: make as many on each stage."
            )
        number = 0
        joined: dict[str, Any] = {"state": {}, "param_groups": []}
        for index, group in enumerate(found[0]["param_groups"]):
            joined["param_groups"].append({**group, "params": []})
            for one in found:
                for old in one["param_groups"][index]["params"]:
                    if old in one["state"]:
                        joined["state"][number] = one["state"][old]
                    joined["param_groups"][index]["params"].append(number)
                    number += 1
        return joined

    def own_optimizer(self, state: Mapping[str, Any], own_groups: Sequence[int]) -> dict[str, Any]:
        """Of a joined state on rank 0, on the first rank of each stage what belongs to its parameters.

        Args:
            state: from ``join_optimizers``, or of one process.
            own_groups: how many parameters each group of this stage has.

        Raises:
            MisconfigurationException: all stages together have another number of parameters.
        """
        everything: dict[str, Any] = self._everyone.broadcast_object(dict(state))
        rows = self._everyone.all_gather_object((self.index, self.is_first, list(own_groups)))
        sizes = [groups for _, _, groups in sorted(row for row in rows if row[1])]
        groups = cast("list[dict[str, Any]]", everything["param_groups"])
        expected = [sum(size) for size in zip(*sizes, strict=True)]
        if [len(group["params"]) for group in groups] != expected:
            raise MisconfigurationException(
                f"the checkpoint holds an optimizer of {[len(group['params']) for group in groups]} parameters, but "
                f"the stages of the pipeline have {expected}: load it into the model that was saved."
            )
        number = 0
        own: dict[str, Any] = {"state": {}, "param_groups": []}
        for index, group in enumerate(groups):
            before = sum(size[index] for size in sizes[: self.index])
            mine = group["params"][before : before + own_groups[index]]
            own["param_groups"].append({**group, "params": list(range(number, number + len(mine)))})
            for old in mine:
                if old in everything["state"]:
                    own["state"][number] = everything["state"][old]
                number += 1
        return own if self.is_first else {}

    @torch.no_grad()
    def clip_by_norm(
        self, parameters: Sequence[Tensor], max_norm: float, *, norm_type: float, error_if_nonfinite: bool
    ) -> Tensor:
        """Scale the gradients of all stages so that their joint norm is at most ``max_norm``.

        Returns:
            The norm before clipping, shape ``()``, equal on every rank.

        Raises:
            RuntimeError: the norm is not finite, and ``error_if_nonfinite``.
        """
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        own = total_norm(gradients, norm_type)
        each = self._along.all_gather(own)  # a NaN of one stage is one of all
        norm = cast("Tensor", torch.linalg.vector_norm(each, norm_type))  # pyright: ignore[reportUnknownMemberType]
        if error_if_nonfinite and not bool(norm.isfinite()):  # one synchronisation, which the caller has asked for
            raise RuntimeError(
                f"the norm of order {norm_type} of the pipeline's gradients is {norm.item()}, so they cannot be "
                f"clipped to {max_norm}. Look for what made them non-finite, or pass error_if_nonfinite=False."
            )
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for gradient in gradients:
            part = local(gradient)
            part.mul_(factor.to(part.device))
        return norm

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of its stage, which holds the stage's whole state."""
        return self._of_stage.rank == 0

    def _on_rank_zero(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """The values of the first ranks of all stages, in order, on rank 0; elsewhere an empty list."""
        rank = self._everyone.rank
        places: list[Any] | None = [None] * self._everyone.world_size if rank == 0 else None
        dist.gather_object(value if self.is_first else None, places, dst=0)
        return [places[first] for first in self._firsts] if places is not None else []


def stage_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The ranks that hold the same stage as this one. Every rank of the mesh must call it."""
    mine: dist.ProcessGroup | None = None
    for row in cast("list[list[int]]", mesh.mesh.reshape(mesh.size(0), -1).tolist()):
        group = cast("dist.ProcessGroup", dist.new_group(row))
        if dist.get_rank() in row:
            mine = group
    assert mine is not None
    return mine
