"""Every backend of this package passes the kit of its seam."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from fulmen_conformance import (
    ClusterEnvironmentConformance,
    CollectivesConformance,
    LauncherConformance,
    Place,
    StrategyConformance,
)
from fulmen_strategies import (
    DDPStrategy,
    FSDPStrategy,
    LightningEnvironment,
    LSFEnvironment,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    SLURMEnvironment,
    TorchCollectives,
    TorchElasticEnvironment,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from fulmen_protocols import ClusterEnvironment, Strategy, Topology

pytestmark = pytest.mark.processes


def joined(topology: Topology) -> TorchCollectives:
    strategy = DDPStrategy()
    strategy.setup_environment(topology)
    return strategy.collectives


class TestSingleDeviceStrategy(StrategyConformance):
    @pytest.fixture
    def strategy(self) -> Strategy:
        return SingleDeviceStrategy()


class TestDDPStrategy(StrategyConformance):
    @pytest.fixture
    def strategy(self) -> Strategy:
        return DDPStrategy()

    @pytest.fixture
    def factory(self) -> str:
        return "fulmen_strategies.ddp:DDPStrategy"


class TestDDPStrategyFindingUnusedParameters(StrategyConformance):
    @pytest.fixture
    def strategy(self) -> Strategy:
        return DDPStrategy(find_unused_parameters=True)

    @pytest.fixture
    def factory(self) -> str:
        return "fulmen_strategies.ddp:find_unused_parameters"


def by_columns_and_rows(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    plan: dict[str, ParallelStyle] = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    known = {name: style for name, style in plan.items() if hasattr(module, name)}
    return parallelize_module(module, mesh["tensor_parallel"], known) if known else module


def by_columns_and_rows_and_fsdp(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    by_columns_and_rows(module, mesh)
    fully_shard(module, mesh=mesh["data_parallel"])
    return module


def tensor_parallel() -> ModelParallelStrategy:
    return ModelParallelStrategy(by_columns_and_rows)


def sharded_and_tensor_parallel() -> ModelParallelStrategy:
    return ModelParallelStrategy(by_columns_and_rows_and_fsdp, tensor_parallel_size=2)


class TestModelParallelStrategy(StrategyConformance):
    @pytest.fixture
    def strategy(self) -> Strategy:
        return tensor_parallel()

    @pytest.fixture
    def factory(self) -> str:
        return f"{__file__}:tensor_parallel"


# torch warns of what a layer split by rows returns: a view, which nobody may change in place.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.slow
class TestModelParallelStrategyWithFullyShard(StrategyConformance):
    @pytest.fixture
    def strategy(self) -> Strategy:
        return ModelParallelStrategy(by_columns_and_rows_and_fsdp, save_distributed_checkpoint=False)

    @pytest.fixture
    def factory(self) -> str:
        return f"{__file__}:sharded_and_tensor_parallel"

    @pytest.fixture
    def num_processes(self) -> int:
        return 4

    @pytest.fixture
    def timeout_s(self) -> float:
        return 180.0


class TestFSDPStrategy(StrategyConformance):
    @pytest.fixture
    def strategy(self) -> Strategy:
        return FSDPStrategy()

    @pytest.fixture
    def factory(self) -> str:
        return "fulmen_strategies.fsdp:FSDPStrategy"


def by_layer() -> FSDPStrategy:
    return FSDPStrategy(auto_wrap_policy={torch.nn.Linear}, state_dict_type="sharded", reduce_accumulated="each")


class TestFSDPStrategyOfSeveralUnits(StrategyConformance):
    @pytest.fixture
    def strategy(self) -> Strategy:
        return by_layer()

    @pytest.fixture
    def factory(self) -> str:
        return f"{__file__}:by_layer"


class TestTorchCollectives(CollectivesConformance):
    @pytest.fixture
    def factory(self) -> str:
        return f"{__file__}:joined"


@pytest.mark.slow
class TestLocalLauncher(LauncherConformance):
    @pytest.fixture
    def factory(self) -> str:
        return "fulmen_strategies.launchers.local:LocalLauncher"


class TestForkLauncher(LauncherConformance):
    @pytest.fixture
    def factory(self) -> str:
        return "fulmen_strategies.launchers.processes:fork_launcher"

    @pytest.fixture
    def runs_apart(self) -> bool:
        return True


class TestLSFEnvironment(ClusterEnvironmentConformance):
    @pytest.fixture
    def make_environment(self) -> Callable[[], ClusterEnvironment]:
        return LSFEnvironment

    @pytest.fixture
    def environment_variables(self, tmp_path: Path) -> Mapping[str, str]:
        hosts = ["launcher", "node-0", "node-0", socket.gethostname(), socket.gethostname()]
        (tmp_path / "ranks").write_text("\n".join(hosts))
        return {
            "LSB_JOBID": "1234567", "LSB_DJOB_RANKFILE": str(tmp_path / "ranks"),
            "JSM_NAMESPACE_SIZE": "4", "JSM_NAMESPACE_RANK": "3", "JSM_NAMESPACE_LOCAL_RANK": "1",
        }  # fmt: skip

    @pytest.fixture
    def expected(self) -> Place:
        return Place(4, 3, 1, 1, True, "node-0", 10567, num_nodes=2, num_devices=2)


class TestLightningEnvironmentAlone(ClusterEnvironmentConformance):
    @pytest.fixture
    def make_environment(self) -> Callable[[], ClusterEnvironment]:
        return LightningEnvironment

    @pytest.fixture
    def environment_variables(self) -> Mapping[str, str]:
        return {}

    @pytest.fixture
    def expected(self) -> Place:
        return Place(creates_processes_externally=False)

    @pytest.fixture
    def is_fallback(self) -> bool:
        return True


class TestLightningEnvironmentStartedByHand(TestLightningEnvironmentAlone):
    @pytest.fixture
    def environment_variables(self) -> Mapping[str, str]:
        return {
            "MASTER_ADDR": "node-0",
            "MASTER_PORT": "23456",
            "WORLD_SIZE": "6",
            "LOCAL_WORLD_SIZE": "3",
            "LOCAL_RANK": "2",
            "NODE_RANK": "1",
        }

    @pytest.fixture
    def expected(self) -> Place:
        return Place(6, 5, 2, 1, True, "node-0", 23456, num_nodes=2, num_devices=3)


class TestTorchElasticEnvironment(ClusterEnvironmentConformance):
    @pytest.fixture
    def make_environment(self) -> Callable[[], ClusterEnvironment]:
        return TorchElasticEnvironment

    @pytest.fixture
    def environment_variables(self) -> Mapping[str, str]:
        # What torch.distributed.run sets (its documentation, section "Environment Variables").
        return {
            "TORCHELASTIC_RUN_ID": "none",
            "MASTER_ADDR": "node-0",
            "MASTER_PORT": "29500",
            "WORLD_SIZE": "8",
            "RANK": "7",
            "LOCAL_RANK": "3",
            "LOCAL_WORLD_SIZE": "4",
            "GROUP_RANK": "1",
        }

    @pytest.fixture
    def expected(self) -> Place:
        return Place(8, 7, 3, 1, True, "node-0", 29500, num_nodes=2, num_devices=4)


class TestSLURMEnvironment(ClusterEnvironmentConformance):
    @pytest.fixture
    def make_environment(self) -> Callable[[], ClusterEnvironment]:
        return SLURMEnvironment

    @pytest.fixture
    def environment_variables(self) -> Mapping[str, str]:
        # What srun sets (its manual page, section "OUTPUT ENVIRONMENT VARIABLES").
        return {
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NAME": "train",
            "SLURM_NTASKS": "6",
            "SLURM_NTASKS_PER_NODE": "3",
            "SLURM_NNODES": "2",
            "SLURM_NODELIST": "gpu[07-08]",
            "SLURM_PROCID": "5",
            "SLURM_LOCALID": "2",
            "SLURM_NODEID": "1",
        }

    @pytest.fixture
    def expected(self) -> Place:
        return Place(6, 5, 2, 1, True, "gpu07", 19567, num_nodes=2, num_devices=3)
