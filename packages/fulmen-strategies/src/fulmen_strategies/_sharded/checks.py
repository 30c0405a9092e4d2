"""What a module is asked before and after its user has placed it on a mesh."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, cast

from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from fulmen_protocols.errors import MisconfigurationException
from fulmen_strategies._sharded.gradients import parameters_of
from fulmen_strategies._sharded.replicas import dimensions, ranks_of
from fulmen_strategies._sharded.states import canonical

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

__all__ = ["overrides_configure_model", "refuse_unreduced", "wrapped_by_first_fsdp"]


def wrapped_by_first_fsdp(module: nn.Module) -> str | None:
    """The name of a part of ``module`` (``""``: itself) that torch's first FSDP wraps; None where there is none."""
    modules = cast("Iterator[tuple[str, nn.Module]]", module.named_modules())
    return next((name for name, one in modules if isinstance(one, FullyShardedDataParallel)), None)


def overrides_configure_model(module: nn.Module) -> bool:
    """Whether a class of ``module``'s replaces the ``configure_model`` that it has inherited."""
    method = getattr(module, "configure_model", None)
    if method is None:
        return False
    declared = [vars(kind)["configure_model"] for kind in type(module).__mro__ if "configure_model" in vars(kind)]
    return len(declared) != 1 or getattr(method, "__func__", method) is not declared[0]


def refuse_unreduced(module: nn.Module, optimizers: Sequence[Optimizer], mesh: DeviceMesh) -> None:
    """Each parameter to train must lie on a mesh that holds all ranks which read other data.

    Raises:
        MisconfigurationException: one does not.
    """
    reading_apart = [name for name in ("data_parallel", "context_parallel") if name in dimensions(mesh)]
    peers = set[int]().union(*(ranks_of(mesh[name]) for name in reading_apart))
    if len(peers) == 1:
        return
    names = {id(parameter): canonical(name) for name, parameter in module.named_parameters()}
    for parameter in itertools.chain(*map(parameters_of, optimizers)):
        reduced = isinstance(parameter, DTensor) and peers <= ranks_of(parameter.device_mesh)
        if parameter.requires_grad and not reduced:
            kinds = " and ".join(f"{name}_size={mesh[name].size()}" for name in reading_apart if mesh[name].size() > 1)
            raise MisconfigurationException(
                f"with {kinds} the gradient of {names.get(id(parameter), 'a parameter')!r} of "
                f"{type(module).__name__} would be each rank's own, because nothing spreads it over those "
                "ranks: after tensor parallel plans call fully_shard(module, mesh=device_mesh['data_parallel']) on "
                "the layers and on the module that holds them, or use tensor parallel alone."
            )
