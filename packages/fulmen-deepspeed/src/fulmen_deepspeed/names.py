"""The strategies by name: each is a DeepSpeedStrategy with some of its arguments set."""

from __future__ import annotations

from typing import Any

from fulmen_deepspeed.strategy import DeepSpeedStrategy

__all__ = [
    "stage_1",
    "stage_1_offload",
    "stage_2",
    "stage_2_offload",
    "stage_3",
    "stage_3_offload",
    "stage_3_offload_nvme",
]


# Any: whatever else DeepSpeedStrategy takes.
def stage_1(**options: Any) -> DeepSpeedStrategy:
    """``"deepspeed_stage_1"``: optimizer state is spread over the ranks."""
    return DeepSpeedStrategy(stage=1, **options)


def stage_1_offload(**options: Any) -> DeepSpeedStrategy:
    """``"deepspeed_stage_1_offload"``: and kept and stepped in host memory."""
    return DeepSpeedStrategy(stage=1, offload_optimizer=True, **options)


def stage_2(**options: Any) -> DeepSpeedStrategy:
    """``"deepspeed_stage_2"``: optimizer state and gradients are spread over the ranks."""
    return DeepSpeedStrategy(stage=2, **options)


def stage_2_offload(**options: Any) -> DeepSpeedStrategy:
    """``"deepspeed_stage_2_offload"``: and optimizer state is kept and stepped in host memory."""
    return DeepSpeedStrategy(stage=2, offload_optimizer=True, **options)


def stage_3(**options: Any) -> DeepSpeedStrategy:
    """``"deepspeed_stage_3"``: parameters are spread over the ranks as well."""
    return DeepSpeedStrategy(stage=3, **options)


def stage_3_offload(**options: Any) -> DeepSpeedStrategy:
    """``"deepspeed_stage_3_offload"``: and all of them are kept in host memory."""
    return DeepSpeedStrategy(stage=3, offload_optimizer=True, offload_parameters=True, **options)


def stage_3_offload_nvme(**options: Any) -> DeepSpeedStrategy:
    """``"deepspeed_stage_3_offload_nvme"``: or on an NVMe drive, at ``nvme_path``."""
    return DeepSpeedStrategy(
        stage=3,
        offload_optimizer=True,
        offload_parameters=True,
        remote_device="nvme",
        offload_params_device="nvme",
        offload_optimizer_device="nvme",
        **options,
    )
