"""Every backend of this package passes the kit of its seam; strategies need DeepSpeed for that."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist

from fulmen_conformance import CollectivesConformance, PrecisionConformance, StrategyConformance
from fulmen_deepspeed import DeepSpeedPrecision, DeepSpeedStrategy, EngineCollectives

if TYPE_CHECKING:
    from fulmen_protocols import Precision, Strategy, Topology

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def joined(topology: Topology) -> EngineCollectives:
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{topology.main_address}:{topology.main_port}",
        rank=topology.rank,
        world_size=topology.world_size,
    )
    return EngineCollectives(topology.device)


def stage_1(**options: Any) -> DeepSpeedStrategy:
    return DeepSpeedStrategy(stage=1, **options)


class TestDeepSpeedPrecision(PrecisionConformance):
    @pytest.fixture
    def precision(self) -> Precision:
        return DeepSpeedPrecision("bf16-true")


class TestFullDeepSpeedPrecision(PrecisionConformance):
    @pytest.fixture
    def precision(self) -> Precision:
        return DeepSpeedPrecision("32-true")


class TestEngineCollectives(CollectivesConformance):
    @pytest.fixture
    def factory(self) -> str:
        return f"{__file__}:joined"


# DeepSpeed calls what torch is about to remove.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@needs_deepspeed
@pytest.mark.slow
class TestDeepSpeedStrategy(StrategyConformance):
    @pytest.fixture
    def strategy(self) -> Strategy:
        return DeepSpeedStrategy()

    @pytest.fixture
    def factory(self) -> str:
        return "fulmen_deepspeed.strategy:DeepSpeedStrategy"

    @pytest.fixture
    def timeout_s(self) -> float:
        return 240.0
