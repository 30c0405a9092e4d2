"""The arguments of FSDPStrategy: what torch's first FSDP took becomes what ``fully_shard`` takes, or an error."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    CPUOffloadPolicy,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    ShardingStrategy,
)

from fulmen_protocols.errors import MisconfigurationException, MisconfigurationTypeError, did_you_mean
from fulmen_strategies._sharded.units import check_policy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fulmen_strategies._sharded.units import Policy

__all__ = ["Options", "Sharding", "mixed_precision", "offload", "options", "recomputed", "sharding"]

StrategyName = Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"]

_NAMES: tuple[str, ...] = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")
_HYBRID = ("HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")

_ELSEWHERE = {
    "accelerator": "pass accelerator= to the Trainer or Fabric",
    "parallel_devices": "pass devices= to the Trainer or Fabric",
    "cluster_environment": "pass it in plugins= of the Trainer or Fabric",
    "checkpoint_io": "pass it in plugins= of the Trainer or Fabric",
    "precision": "pass precision= to the Trainer or Fabric",
    "precision_plugin": "pass precision= to the Trainer or Fabric",
    "device_id": "each rank takes its own device; choose devices with devices= of the Trainer or Fabric",
    "process_group": "the ranks that share a model are given by device_mesh=(replicas, shards)",
    "param_init_fn": "give modules that are created on the meta device a reset_parameters() method",
}


class Sharding(NamedTuple):
    """A sharding strategy with its mesh."""

    name: str
    mesh: DeviceMesh | tuple[int, int] | None

    @property
    def frees_after_forward(self) -> bool | None:
        """``reshard_after_forward`` of ``fully_shard``; None is its default: yes, but for the root."""
        return None if self.name in ("FULL_SHARD", "HYBRID_SHARD") else False

    def check(self, devices: int, num_nodes: int) -> None:
        """Compare the mesh with the number of processes.

        Raises:
            MisconfigurationException: they differ.
        """
        world = devices * num_nodes
        if isinstance(self.mesh, DeviceMesh):
            return  # it was made in a process group, so in as many processes as there are
        if self.mesh is not None and self.mesh[0] * self.mesh[1] != world:
            raise MisconfigurationException(
                f"FSDPStrategy got device_mesh={self.mesh!r}, {self.mesh[0]} replicas of {self.mesh[1]} shards, which "
                f"makes {self.mesh[0] * self.mesh[1]} processes, but the run has {world}. Make the two equal."
            )

    def make_mesh(self, device_type: str, world_size: int, num_nodes: int) -> DeviceMesh:
        """The mesh of the running processes: one axis, or (replicas, shards). A collective."""
        if isinstance(self.mesh, DeviceMesh):
            return self.mesh
        if self.name == "NO_SHARD":
            shape: tuple[int, ...] = (world_size, 1)
        elif self.mesh is not None:
            shape = self.mesh
        elif self.name in _HYBRID:  # a model is spread over one machine, whose devices are well connected
            shape = (num_nodes, world_size // num_nodes)
        else:
            return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
        return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def sharding(strategy: object, mesh: object, *, has_policy: bool) -> Sharding:
    """Read ``sharding_strategy`` and ``device_mesh``.

    Raises:
        MisconfigurationException: an unknown strategy, or one that contradicts the mesh.
    """
    name = strategy.name if isinstance(strategy, ShardingStrategy) else strategy
    if not isinstance(name, str) or name.upper() not in _NAMES:
        raise MisconfigurationException(
            f"FSDPStrategy got sharding_strategy={strategy!r}.{did_you_mean(str(name), _NAMES)} "
            f"Allowed: {', '.join(_NAMES)}, or torch.distributed.fsdp.ShardingStrategy."
        )
    name = name.upper()
    if mesh is None:
        if name in _HYBRID and not has_policy:
            raise MisconfigurationException(
                f"FSDPStrategy got sharding_strategy={name!r} without auto_wrap_policy or device_mesh: nothing says "
                "how to spread the model. Give device_mesh=(replicas, shards), or an auto_wrap_policy to shard within "
                "each machine and replicate over machines."
            )
        return Sharding(name, None)
    dims = _dims(mesh)
    if name == "NO_SHARD":
        raise MisconfigurationException(
            f"FSDPStrategy got device_mesh={mesh!r} with sharding_strategy='NO_SHARD', which replicates the model on "
            "every rank and needs no mesh. Remove one of the two."
        )
    if (dims == 2) != (name in _HYBRID):
        right = "HYBRID_SHARD" if dims == 2 else "FULL_SHARD"
        raise MisconfigurationException(
            f"FSDPStrategy got a device_mesh of {dims} dimension(s) with sharding_strategy={name!r}. Use "
            f"sharding_strategy={right!r} with it, or another mesh."
        )
    if isinstance(mesh, DeviceMesh) and dims == 2 and not mesh.mesh_dim_names:
        raise MisconfigurationException(
            "FSDPStrategy got a device_mesh of 2 dimensions without names, which fully_shard does not take. Make it "
            "with init_device_mesh(..., mesh_dim_names=('replicate', 'shard'))."
        )
    return Sharding(name, cast("DeviceMesh | tuple[int, int]", mesh))


def _dims(mesh: object) -> int:
    if isinstance(mesh, DeviceMesh) and mesh.ndim in (1, 2):
        return mesh.ndim
    if isinstance(mesh, (tuple, list)):
        sizes = cast("Sequence[object]", mesh)
        if len(sizes) == 2 and all(type(size) is int and size >= 1 for size in sizes):
            return 2
    raise MisconfigurationException(
        f"FSDPStrategy got device_mesh={mesh!r}. Give a tuple of two numbers, (replicas, shards), or a DeviceMesh of "
        "one or two dimensions."
    )


def offload(asked: object) -> OffloadPolicy:
    """Read ``cpu_offload``: a bool, torch's ``CPUOffload``, or a policy of ``fully_shard``."""
    if isinstance(asked, OffloadPolicy):
        return asked
    if isinstance(asked, CPUOffload):
        asked = asked.offload_params
    if asked is None or asked is False:
        return OffloadPolicy()
    if asked is True:
        return CPUOffloadPolicy()
    raise MisconfigurationTypeError(
        f"FSDPStrategy got cpu_offload={asked!r}. Give True, False, a CPUOffload or a CPUOffloadPolicy."
    )


def mixed_precision(asked: object) -> MixedPrecisionPolicy | None:
    """Read ``mixed_precision``: a policy of ``fully_shard``, or torch's older ``MixedPrecision`` as far as it maps."""
    if asked is None or isinstance(asked, MixedPrecisionPolicy):
        return asked
    if not isinstance(asked, MixedPrecision):
        raise MisconfigurationTypeError(
            f"FSDPStrategy got mixed_precision={asked!r}. Give a torch.distributed.fsdp.MixedPrecisionPolicy or a "
            "MixedPrecision, or leave it out and set precision= on the Trainer or Fabric."
        )
    if asked.buffer_dtype is not None:
        raise MisconfigurationException(
            f"FSDPStrategy got mixed_precision with buffer_dtype={asked.buffer_dtype}, but fully_shard leaves buffers "
            "as they are. Leave buffer_dtype out, and cast the buffers that need it."
        )
    if asked.keep_low_precision_grads:
        raise MisconfigurationException(
            "FSDPStrategy got mixed_precision with keep_low_precision_grads=True, but with fully_shard gradients have "
            "the dtype of the stored parameters. Leave it out, or use precision='bf16-true'."
        )
    casts = asked.cast_forward_inputs or asked.cast_root_forward_inputs
    return MixedPrecisionPolicy(asked.param_dtype, asked.reduce_dtype, cast_forward_inputs=casts)


def recomputed(older: object, policy: Policy | None) -> Policy | None:
    """Read ``activation_checkpointing_policy``, and its older form: a class or several.

    Raises:
        MisconfigurationException: both are given.
        MisconfigurationTypeError: the older one is no class of modules.
    """
    if older is None:
        return policy
    if policy is not None:
        raise MisconfigurationException(
            "FSDPStrategy got both activation_checkpointing and activation_checkpointing_policy. Give the latter only."
        )
    classes = set(cast("list[Any]", older) if isinstance(older, (list, tuple, set)) else [older])
    check_policy("activation_checkpointing", classes)
    warnings.warn(
        "FSDPStrategy(activation_checkpointing=...) is deprecated: write activation_checkpointing_policy={...}.",
        DeprecationWarning,
        stacklevel=3,
    )
    return cast("Policy", classes)


@dataclass(frozen=True, slots=True)
class Options:
    """What the further keywords say."""

    sync_module_states: bool = True
    forward_prefetch: bool = False
    ignored: tuple[nn.Module | torch.Tensor, ...] = ()

    def ignored_parameters(self) -> set[nn.Parameter]:
        """Parameters that stay as they are on every rank, and are not reduced."""
        found: set[nn.Parameter] = set()
        for one in self.ignored:
            found.update(one.parameters() if isinstance(one, nn.Module) else [cast("nn.Parameter", one)])
        return found


def options(given: dict[str, Any]) -> Options:
    """Read the keywords that torch's first FSDP took.

    Raises:
        MisconfigurationException: one that cannot be honoured; the message says why and what to do.
    """
    given = dict(given)
    for name, reason in _ELSEWHERE.items():
        if given.pop(name, None) is not None:
            raise MisconfigurationException(f"FSDPStrategy does not take {name}=: {reason}.")
    if given.pop("use_orig_params", True) is not True:
        raise MisconfigurationException(
            "FSDPStrategy got use_orig_params=False, but fully_shard has no flat parameters: optimizers hold the "
            "model's own. Leave it out, and make optimizers from self.parameters()."
        )
    if given.pop("limit_all_gathers", True) is not True:
        raise MisconfigurationException(
            "FSDPStrategy got limit_all_gathers=False, but fully_shard always limits them. Leave it out."
        )
    prefetch = given.pop("backward_prefetch", BackwardPrefetch.BACKWARD_PRE)
    if prefetch is not BackwardPrefetch.BACKWARD_PRE:
        raise MisconfigurationException(
            f"FSDPStrategy got backward_prefetch={prefetch!r}, but fully_shard gathers the next unit before the "
            "gradients of the current one are computed (BACKWARD_PRE). Leave it out."
        )
    ignored = [*_listed(given.pop("ignored_modules", None)), *_listed(given.pop("ignored_states", None))]
    wrong = [one for one in ignored if not isinstance(one, (nn.Module, torch.Tensor))]
    if wrong:
        raise MisconfigurationTypeError(
            f"FSDPStrategy got {wrong[0]!r} among ignored_modules or ignored_states. Give modules or parameters."
        )
    flags = {name: given.pop(name) for name in ("sync_module_states", "forward_prefetch") if name in given}
    for name, value in flags.items():
        if type(value) is not bool:
            raise MisconfigurationTypeError(f"FSDPStrategy got {name}={value!r}. Give True or False.")
    if given:
        name = next(iter(given))
        known = (*flags, "sync_module_states", "forward_prefetch", "ignored_modules", "ignored_states")
        raise MisconfigurationTypeError(
            f"FSDPStrategy got an option {name!r} that it does not have.{did_you_mean(name, known)} "
            f"Besides its own arguments it takes: {', '.join(sorted(set(known)))}."
        )
    return Options(ignored=tuple(cast("Iterable[nn.Module | torch.Tensor]", ignored)), **flags)


def _listed(value: Iterable[object] | None) -> list[object]:
    return [] if value is None else list(value)
