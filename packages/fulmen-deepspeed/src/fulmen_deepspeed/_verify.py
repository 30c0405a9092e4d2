"""What DeepSpeed cannot do, found before anything starts."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from fulmen_deepspeed._library import submodule
from fulmen_protocols.errors import BackendUnavailable, MisconfigurationException

if TYPE_CHECKING:
    import torch

__all__ = ["devices", "no_arguments_beside", "nvme"]

# Besides a configuration these still have a meaning: they are no part of it.
_BESIDE_A_CONFIG = frozenset({
    "accelerator", "remote_device", "config", "logging_level", "parallel_devices", "cluster_environment", "loss_scale",
    "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale", "load_full_weights", "precision_plugin",
    "process_group_backend", "timeout", "exclude_frozen_parameters", "precision",
})  # fmt: skip


def devices(found: Sequence[torch.device]) -> None:
    """Refuse devices that DeepSpeed cannot drive, or drives under other numbers.

    Raises:
        MisconfigurationException: one of the two.
    """
    kind = found[0].type
    if kind not in ("cuda", "cpu"):
        raise MisconfigurationException(
            f"strategy 'deepspeed' runs on CUDA GPUs and on the CPU, but the run is on {kind!r}. Pass "
            "accelerator='cuda' or 'cpu', or another strategy."
        )
    indices = [device.index for device in found]
    if kind == "cuda" and indices != list(range(len(found))):
        shown = ",".join(map(str, indices))
        raise MisconfigurationException(
            f"devices={indices}: DeepSpeed gives the process with local rank i the GPU i, so it needs devices 0 to "
            f"{len(found) - 1}. Set CUDA_VISIBLE_DEVICES={shown} and pass devices={len(found)}."
        )


def nvme(config: Mapping[str, Any]) -> None:
    """Refuse offloading to NVMe where the library for it is missing.

    Raises:
        BackendUnavailable: it is.
    """
    zero: Any = config.get("zero_optimization")
    if not isinstance(zero, Mapping):
        return
    sections = cast("Mapping[str, Any]", zero)
    asked = [
        name
        for name in ("offload_optimizer", "offload_param")
        if isinstance(sections.get(name), Mapping) and sections[name].get("device") == "nvme"
    ]
    if asked and not submodule("deepspeed.ops.op_builder").AsyncIOBuilder().is_compatible(verbose=False):
        raise BackendUnavailable(
            f"{' and '.join(asked)} were asked to go to 'nvme', but this machine lacks libaio, which DeepSpeed reads "
            "and writes with. Install it (Debian, Ubuntu: apt install libaio-dev), or offload to 'cpu'."
        )


def no_arguments_beside(cls: type, given: Mapping[str, Any], source: str) -> None:
    """Refuse arguments that a configuration would silently replace.

    Raises:
        MisconfigurationException: one of them was given.
    """
    defaults = {name: one.default for name, one in inspect.signature(cls).parameters.items()}
    contradicting = [
        f"{name}={given[name]!r}"
        for name, default in defaults.items()
        if name not in _BESIDE_A_CONFIG and given[name] != default
    ]
    if contradicting:
        what = "config=" if source.startswith("config=") else source
        raise MisconfigurationException(
            f"DeepSpeedStrategy got {', '.join(contradicting)}, and a configuration ({what}), which replaces what "
            "these arguments stand for. Write it into the configuration, or leave the configuration out."
        )
