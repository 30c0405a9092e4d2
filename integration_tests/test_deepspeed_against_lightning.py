"""DeepSpeedStrategy takes Lightning's arguments, and makes the same configuration of them; neither needs DeepSpeed."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy as FabricStrategy
from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy as TrainerStrategy

from fulmen.strategies import DeepSpeedStrategy
from fulmen_deepspeed import config as configs
from fulmen_protocols import STRATEGIES, available

OURS = inspect.signature(DeepSpeedStrategy).parameters


@pytest.mark.proves("4.28")
@pytest.mark.parametrize("theirs", [TrainerStrategy, FabricStrategy])
def test_every_argument_has_lightning_s_name_and_default(theirs: Any) -> None:
    for name, parameter in inspect.signature(theirs).parameters.items():
        assert name in OURS, name
        # The one for Fabric says None where that for the Trainer says "auto", and both mean the same here.
        if name != "logging_batch_size_per_gpu":
            assert OURS[name].default == parameter.default, name
    order = [name for name in inspect.signature(TrainerStrategy).parameters if name in OURS]
    assert list(OURS)[: len(order)] == order, "by position too"


@pytest.mark.proves("4.28")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"zero_optimization": False},
        {"stage": 1, "offload_optimizer": True, "pin_memory": True},
        {"stage": 3, "offload_optimizer": True, "offload_parameters": True, "remote_device": "nvme",
         "offload_params_device": "nvme", "offload_optimizer_device": "nvme", "nvme_path": "/fast", "max_in_cpu": 7},
        {"reduce_bucket_size": 5, "allgather_bucket_size": 6, "sub_group_size": 8, "overlap_comm": False,
         "contiguous_gradients": False, "reduce_scatter": False, "allgather_partitions": False},
        {"partition_activations": True, "cpu_checkpointing": True, "block_size": 1, "queue_depth": 2,
         "single_submit": True, "overlap_events": False, "thread_count": 3, "logging_batch_size_per_gpu": 16},
    ],
)  # fmt: skip
def test_the_configuration_is_lightning_s(changes: dict[str, Any]) -> None:
    make = TrainerStrategy._create_default_config
    names = [name for name in inspect.signature(make).parameters if name not in ("self", "zero_kwargs")]
    zero = ["stage", "contiguous_gradients", "overlap_comm", "allgather_partitions", "reduce_scatter",
            "allgather_bucket_size", "reduce_bucket_size", "sub_group_size"]  # fmt: skip
    given = {**{name: one.default for name, one in OURS.items()}, **changes}

    theirs = make(SimpleNamespace(), **{name: given[name] for name in [*names, *zero]})

    assert configs.default_config(given) == theirs


@pytest.mark.proves("4.2", "4.3")
def test_every_name_of_lightning_s_is_there() -> None:
    from lightning.fabric.strategies import STRATEGY_REGISTRY as fabric
    from lightning.pytorch.strategies import StrategyRegistry as trainer

    theirs = {name for registry in (fabric, trainer) for name in registry if name.startswith("deepspeed")}

    assert len(theirs) == 8
    assert theirs <= set(available(STRATEGIES))
