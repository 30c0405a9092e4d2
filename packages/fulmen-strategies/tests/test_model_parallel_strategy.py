"""ModelParallelStrategy on four gloo ranks, on meshes of several shapes, against one process that holds everything.

This file is also the script that the ranks run: each ``check_...`` runs once on every rank, one test reports each.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss

from fulmen_protocols import (
    MisconfigurationException,
    MisconfigurationTypeError,
    SupportsBoundMethods,
    SupportsDataParallel,
    SupportsDeviceMesh,
    SupportsGradClipping,
    SupportsLaunch,
    SupportsModuleCheck,
    SupportsNoSync,
    SupportsShardedState,
    SupportsWorldCheck,
    Topology,
    missing_members,
)
from fulmen_strategies import LightningEnvironment, LocalLauncher, ModelParallelStrategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.distributed.device_mesh import DeviceMesh

    Check = Callable[["Rank"], None]

pytestmark = pytest.mark.processes

RANKS = 4
SHAPES = [(1, 4), (2, 2), (4, 1)]
# Partial sums are added in another order than one process adds them.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}

# ------------------------------------------------------------------------------------------- what the ranks train


class Net(nn.Module):
    """Layers to be split by columns and rows, others on no plan, and a buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 8)
        self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("scale", torch.tensor(1.0 + seed))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.second(torch.relu(self.first(x))))
        return self.last(self.dropout(hidden) if self.training and self.dropping else hidden) * self.scale

    dropping = False


def by_layers(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Tensor parallel alone."""
    plan: Any = {"first": ColwiseParallel(), "second": RowwiseParallel()}
    return parallelize_module(module, mesh["tensor_parallel"], plan)


def by_both(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Tensor parallel, and FSDP2 over the data-parallel ranks."""
    by_layers(module, mesh)
    for layer in (module.first, module.second):
        fully_shard(layer, mesh=mesh["data_parallel"])
    return fully_shard(module, mesh=mesh["data_parallel"])


def batches(part: int, count: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(100 + part)
    return [(torch.randn(5, 6, generator=draw), torch.randn(5, 3, generator=draw)) for _ in range(count)]


def joint(parts: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """What all parts read, together: the mean over it has the mean of the parts' gradients."""
    found = [batches(part, count) for part in range(parts)]
    return [tuple(torch.cat(pieces) for pieces in zip(*rows, strict=True)) for rows in zip(*found, strict=True)]  # type: ignore[misc]


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.02)


def trained(module: nn.Module, data: list[tuple[Tensor, Tensor]], clip: Callable[[Any], Tensor]) -> list[Tensor]:
    """Train ``module`` and return the norms before clipping."""
    optimizer, norms = adam(module), []
    for x, y in data:
        optimizer.zero_grad()
        mse_loss(module(x), y).backward()
        norms.append(clip(optimizer).detach().clone())
        optimizer.step()
    return norms


class Rank:
    """One process, joined to the others."""

    def __init__(self, topology: Topology) -> None:
        self.topology, self.rank = topology, topology.rank
        self.first = self.joined(by_both)

    def joined(self, fn: Any, data: int = 2, tensor: int = 2, **options: Any) -> ModelParallelStrategy:
        strategy = ModelParallelStrategy(fn, data_parallel_size=data, tensor_parallel_size=tensor, **options)
        strategy.setup_environment(self.topology)
        return strategy

    def whole(self, strategy: ModelParallelStrategy, placed: nn.Module) -> dict[str, Tensor]:
        """The whole state on every rank."""
        state: Any = strategy.module_state(placed, full=True)
        assert bool(state) == (self.rank == 0)
        return self.first.collectives.broadcast_object(state)

    def clip(self, strategy: ModelParallelStrategy, placed: nn.Module, optimizer: Any) -> Tensor:
        return strategy.clip_grad_norm(placed, optimizer, 0.3)


def plain_clip(module: nn.Module, optimizer: Any) -> Tensor:
    return nn.utils.clip_grad_norm_(module.parameters(), 0.3)


def close(got: dict[str, Tensor], want: dict[str, Tensor], **tolerance: float) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, msg=lambda text, name=name: f"{name}: {text}", **(tolerance or CLOSE)
        )


# ------------------------------------------------------------------------------------------- the checks


@pytest.mark.proves("4.24")
def check_the_mesh_has_two_named_dimensions_and_sizes_that_follow(me: Rank) -> None:
    for asked, found in [
        ({}, (1, 4)),
        ({"data_parallel_size": 2}, (2, 2)),
        ({"tensor_parallel_size": 1}, (4, 1)),
        ({"data_parallel_size": 1, "tensor_parallel_size": 4}, (1, 4)),
    ]:
        strategy = ModelParallelStrategy(**asked)  # type: ignore[arg-type]
        strategy.setup_environment(me.topology)
        mesh = strategy.device_mesh
        assert mesh.mesh_dim_names == ("data_parallel", "tensor_parallel")
        assert tuple(mesh.shape) == found
        assert strategy.data_parallel_size == found[0]
        assert strategy.data_parallel_rank == me.rank // found[1]
    wider = ModelParallelStrategy(tensor_parallel_size=1, context_parallel_size=2, pipeline_parallel_size=2)
    wider.setup_environment(me.topology)
    assert wider.device_mesh.mesh_dim_names == (
        "pipeline_parallel", "data_parallel", "context_parallel", "tensor_parallel",
    )  # fmt: skip
    assert (wider.data_parallel_rank, wider.data_parallel_size) == (0, 1)


@pytest.mark.proves("4.24", "4.25")
def check_training_with_clipping_equals_one_process_on_every_mesh(me: Rank) -> None:
    for data, tensor in SHAPES:
        strategy = me.joined(by_both, data, tensor)
        placed = strategy.place(Net())
        norms = trained(placed, batches(strategy.data_parallel_rank, 5), partial(me.clip, strategy, placed))
        one = Net()
        expected = trained(one, joint(data, 5), partial(plain_clip, one))
        for got, want in zip(norms, expected, strict=True):
            assert type(got) is Tensor
            torch.testing.assert_close(got, want, **CLOSE)
        close(me.whole(strategy, placed), one.state_dict())


@pytest.mark.proves("4.24")
def check_tensor_parallel_alone_equals_one_process(me: Rank) -> None:
    strategy = me.joined(by_layers, 1, 4)
    placed = strategy.place(Net())
    assert isinstance(placed.first.weight, DTensor)
    assert placed.first.weight.to_local().shape == (3, 6)
    norms = trained(placed, batches(0, 5), partial(me.clip, strategy, placed))
    one = Net()
    torch.testing.assert_close(torch.stack(norms), torch.stack(trained(one, batches(0, 5), partial(plain_clip, one))))
    close(me.whole(strategy, placed), one.state_dict())


def check_a_window_without_sync_costs_one_reduction_and_changes_nothing(me: Rank) -> None:
    strategy = me.joined(by_both)
    placed, one = strategy.place(Net()), Net()
    optimizer, counts = adam(placed), []
    for index, (x, y) in enumerate(batches(strategy.data_parallel_rank, 3)):
        with CommDebugMode() as counter:
            if index < 2:
                with strategy.no_sync(placed):
                    (mse_loss(placed(x), y) / 3).backward()
            else:
                (mse_loss(placed(x), y) / 3).backward()
        counts.append(sum(n for op, n in counter.get_comm_counts().items() if "reduce_scatter" in str(op)))
    optimizer.step()
    plain = adam(one)
    for x, y in joint(2, 3):
        (mse_loss(one(x), y) / 3).backward()
    plain.step()
    assert counts == [0, 0, 3]
    close(me.whole(strategy, placed), one.state_dict())


def check_clipping_by_value_equals_one_process(me: Rank) -> None:
    strategy = me.joined(by_both)
    placed, one = strategy.place(Net()), Net()
    optimizer = adam(placed)
    x, y = batches(strategy.data_parallel_rank, 1)[0]
    mse_loss(placed(x), y).backward()
    strategy.clip_grad_value(placed, optimizer, 0.01)
    x, y = joint(2, 1)[0]
    mse_loss(one(x), y).backward()
    nn.utils.clip_grad_value_(one.parameters(), 0.01)
    for got, want in zip(placed.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(got.grad.full_tensor(), want.grad, **CLOSE)  # type: ignore[union-attr]


@pytest.mark.proves("4.27")
def check_states_cross_between_meshes_and_one_process_in_both_kinds(me: Rank) -> None:
    """Adam in the middle of training: saved on one mesh, it goes on alike on every other, and in one process."""
    for shape in SHAPES:
        source = me.joined(by_both, *shape)
        placed, optimizer = source.place(Net()), None
        optimizer = adam(placed)
        for x, y in batches(0, 3):  # all parts read the same: so that every mesh has the same next step
            optimizer.zero_grad()
            mse_loss(placed(x), y).backward()
            optimizer.step()
        for full in (True, False):
            weights = source.module_state(placed, full=full)
            state: Any = source.optimizer_state(placed, optimizer, full=full)
            if full:
                assert bool(weights) == bool(state) == (me.rank == 0)
            else:
                assert all(isinstance(value, DTensor) for name, value in weights.items() if name != "scale")
            one = Net(seed=9)
            one.load_state_dict(me.whole(source, placed))
            plain = adam(one)
            whole: Any = source.optimizer_state(placed, optimizer, full=True)
            plain.load_state_dict(me.first.collectives.broadcast_object(whole))
            x, y = batches(7, 1)[0]
            mse_loss(one(x), y).backward()
            plain.step()
            for other in SHAPES if full else [shape]:
                target = me.joined(by_both, *other)
                again = target.place(Net(seed=9))
                rest = adam(again)
                target.load_module_state(again, weights, strict=True)
                target.load_optimizer_state(again, rest, copy.deepcopy(state))
                close(me.whole(target, again), me.whole(source, placed), rtol=0, atol=0)
                mse_loss(again(x), y).backward()
                rest.step()
                close(me.whole(target, again), dict(one.state_dict()))


def check_a_plain_state_dict_loads_and_misfits_are_told(me: Rank) -> None:
    strategy = me.joined(by_both)
    placed = strategy.place(Net())
    strategy.load_module_state(placed, Net(seed=4).state_dict(), strict=True)
    close(me.whole(strategy, placed), Net(seed=4).state_dict(), rtol=0, atol=0)
    lacking = {name: value for name, value in Net().state_dict().items() if name != "last.weight"}
    with pytest.raises(RuntimeError, match=r"last\.weight"):
        strategy.load_module_state(placed, lacking, strict=True)
    outcome: Any = strategy.load_module_state(placed, {**lacking, "more": torch.ones(1)}, strict=False)
    assert (outcome.missing_keys, outcome.unexpected_keys) == (["last.weight"], ["more"])


@pytest.mark.proves("4.25")
def check_meta_parameters_get_the_values_of_one_process(me: Rank) -> None:
    class Unseeded(Net):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 8)
            self.norm, self.last = nn.LayerNorm(8), nn.Linear(8, 3)
            self.dropout = nn.Dropout(0.5)
            self.scale = torch.tensor(1.0, device="cpu")

    class Ruled(Unseeded):
        def __init__(self) -> None:
            super().__init__()
            self.apply(self._init_weights)

        def _init_weights(self, layer: nn.Module) -> None:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)

    for kind, fn, shape in ((Unseeded, by_both, (2, 2)), (Unseeded, by_layers, (1, 4)), (Ruled, by_both, (2, 2))):
        torch.manual_seed(5)
        one = kind()
        strategy = me.joined(fn, *shape)
        with strategy.module_context(empty=True):
            module = kind()
        assert all(parameter.is_meta for parameter in module.parameters())
        torch.manual_seed(5 if me.rank == 0 else 6)
        placed = strategy.place(module)
        assert not any(parameter.is_meta for parameter in placed.parameters())
        close(me.whole(strategy, placed), one.state_dict(), rtol=0, atol=0)


@pytest.mark.proves("4.24")
def check_every_rank_starts_with_the_values_of_rank_0(me: Rank) -> None:
    for fn, shape in ((by_layers, (1, 4)), (by_both, (2, 2)), (by_both, (4, 1))):
        strategy = me.joined(fn, *shape)
        placed = strategy.place(Net(seed=me.rank))
        close(me.whole(strategy, placed), Net().state_dict(), rtol=0, atol=0)
        for name, tensor in (*placed.named_parameters(), *placed.named_buffers()):
            if not isinstance(tensor, DTensor):
                assert torch.equal(tensor, Net().state_dict()[name]), name


@pytest.mark.proves("4.24")
def check_a_module_that_placed_itself_is_equal_where_it_must_be(me: Rank) -> None:
    """Built before the ranks could agree on anything: tensor-parallel peers still hold the same whole layers."""
    strategy = me.joined(None)
    module = by_both(Net(seed=me.rank), strategy.device_mesh)
    placed = strategy.place(module)
    peer = torch.stack([placed.last.weight.to_local().sum(), placed.norm.weight.to_local().sum()])
    sums = me.first.collectives.all_gather(peer.detach())
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[2], sums[3])
    assert not torch.equal(sums[0], sums[2])  # those are parts of their own


@pytest.mark.proves("4.25")
def check_a_module_is_parallelized_once(me: Rank) -> None:
    calls: list[nn.Module] = []

    def counted(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        calls.append(module)
        return by_both(module, mesh)

    strategy, module = me.joined(counted), Net()
    assert strategy.place(module) is strategy.place(module)
    assert calls == [module]


@pytest.mark.proves("4.25")
def check_an_optimizer_that_was_made_before_trains_the_placed_parameters(me: Rank) -> None:
    strategy, module, one = me.joined(by_both), Net(), Net()
    optimizer = adam(module)
    placed = strategy.place(module)
    [ready] = strategy.prepare_optimizers(placed, [optimizer])
    x, y = batches(strategy.data_parallel_rank, 1)[0]
    mse_loss(placed(x), y).backward()
    ready.step()
    plain = adam(one)
    x, y = joint(2, 1)[0]
    mse_loss(one(x), y).backward()
    plain.step()
    close(me.whole(strategy, placed), one.state_dict())

    # One that has taken steps keeps what it knows.
    for step in range(2):
        x, y = joint(2, 2)[step]
        plain.zero_grad()
        mse_loss(one(x), y).backward()
        plain.step()
        if step == 0:
            used, half_trained = me.joined(by_both), copy.deepcopy(one)
            late = adam(half_trained)
            late.load_state_dict(copy.deepcopy(plain.state_dict()))
            again = used.place(half_trained)
            used.prepare_optimizers(again, [late])
    x, y = batches(used.data_parallel_rank, 2)[1]
    mse_loss(again(x), y).backward()
    late.step()
    close(me.whole(used, again), one.state_dict())


@pytest.mark.proves("4.27")
def check_a_compiled_module_has_canonical_names_and_trains_alike(me: Rank) -> None:
    def compiled(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        by_both(module, mesh)
        module.first = torch.compile(module.first, backend="aot_eager")  # type: ignore[assignment]
        return torch.compile(module, backend="aot_eager")  # type: ignore[return-value]

    strategy = me.joined(compiled)
    placed, one = strategy.place(Net()), Net()
    norms = trained(placed, batches(strategy.data_parallel_rank, 2), partial(me.clip, strategy, placed))
    expected = trained(one, joint(2, 2), partial(plain_clip, one))
    torch.testing.assert_close(torch.stack(norms), torch.stack(expected), **CLOSE)
    close(me.whole(strategy, placed), one.state_dict())
    strategy.load_module_state(placed, Net(seed=3).state_dict(), strict=True)
    close(me.whole(strategy, placed), Net(seed=3).state_dict(), rtol=0, atol=0)


def check_a_parameter_that_would_not_be_averaged_is_refused(me: Rank) -> None:
    strategy = me.joined(by_layers)
    placed = strategy.place(Net())  # as for an evaluation, in which nobody takes gradients
    with pytest.raises(MisconfigurationException) as caught:
        strategy.prepare_optimizers(placed, [adam(placed)])
    for part in ("'first.weight' of Net", "data_parallel_size=2", "fully_shard(module, mesh=", "tensor parallel alone"):
        assert part in str(caught.value)

    def forgets_one(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        by_layers(module, mesh)
        for layer in (module.first, module.second, module.last):
            fully_shard(layer, mesh=mesh["data_parallel"])
        return module

    strategy = me.joined(forgets_one)
    placed = strategy.place(Net())
    with pytest.raises(MisconfigurationException, match=r"'norm\.weight'"):
        strategy.prepare_optimizers(placed, [adam(placed)])
    placed.norm.requires_grad_(False)
    strategy.prepare_optimizers(placed, [adam(placed)])


@pytest.mark.proves("4.24", "4.25")
def check_what_is_returned_must_be_a_module_without_fsdp1(me: Rank) -> None:
    with pytest.raises(
        MisconfigurationTypeError, match="parallelize_fn of ModelParallelStrategy returned None for Net"
    ):
        me.joined(lambda module, mesh: None).place(Net())
    with pytest.raises(MisconfigurationTypeError, match=r"FSDP1\): use torch\.distributed\.fsdp\.fully_shard"):
        me.joined(lambda module, mesh: _old(module)).place(Net())
    with pytest.raises(MisconfigurationTypeError, match="Sequential, whose '0' is wrapped in"):
        me.joined(None).check_module(nn.Sequential(_old(Net())))


def _old(module: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"))


def check_policies_of_the_users_own_hold(me: Rank) -> None:
    """``fully_shard`` takes a mixed precision policy; the strategy leaves it alone."""

    def mixed(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        return fully_shard(module, mesh=mesh["data_parallel"], mp_policy=policy)

    strategy = me.joined(mixed, 4, 1)
    placed = strategy.place(Net())
    assert {parameter.dtype for parameter in placed.parameters()} == {torch.float32}
    assert placed(torch.ones(2, 6)).dtype == torch.bfloat16


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    environment = LightningEnvironment()

    def run_checks() -> None:
        rank = environment.local_rank()
        me = Rank(
            Topology(
                devices=(torch.device("cpu"),) * RANKS, rank=rank, local_rank=rank, world_size=RANKS,
                main_address=environment.main_address, main_port=environment.main_port,
            )
        )  # fmt: skip
        for name, check in CHECKS.items():
            error = ""
            try:
                check(me)
            except BaseException:  # noqa: BLE001  # its report is the point
                error = traceback.format_exc()
            errors = me.first.collectives.all_gather_object(error)
            (folder / f"{name}-{rank}.json").write_text(json.dumps(errors))
        me.first.teardown()
        me.first.teardown()
        assert not dist.is_initialized()

    LocalLauncher().launch(
        run_checks, num_processes=RANKS, num_nodes=1, node_rank=0,
        main_address=environment.main_address, main_port=environment.main_port,
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.exit()

# ----------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("model-parallel")
    env = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, str(folder)],
        env={**env, "OMP_NUM_THREADS": "1"}, text=True, timeout=500, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        check=False,
    )  # fmt: skip
    (folder / "output").write_text(f"exit status {done.returncode}\n{done.stdout}")
    return folder


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.slow
def test_on_four_ranks(folder: Path, name: str) -> None:
    file = folder / f"{name}-0.json"
    if not file.exists():
        pytest.fail(f"no result:\n{(folder / 'output').read_text()[-5000:]}", pytrace=False)
    for rank, error in enumerate(json.loads(file.read_text())):
        if error:
            pytest.fail(f"on rank {rank}:\n{error}", pytrace=False)


@pytest.mark.slow
def test_the_four_ranks_end_well(folder: Path) -> None:
    assert (folder / "output").read_text().splitlines()[:1] == ["exit status 0"]


def test_it_offers_what_model_parallel_can_do() -> None:
    strategy = ModelParallelStrategy()
    for ability in (
        SupportsBoundMethods,
        SupportsDataParallel,
        SupportsDeviceMesh,
        SupportsGradClipping,
        SupportsLaunch,
        SupportsModuleCheck,
        SupportsNoSync,
        SupportsShardedState,
        SupportsWorldCheck,
    ):
        assert missing_members(ability, strategy) == []
    assert strategy.launcher == "local"
    assert strategy.state_kind == "sharded"
    assert ModelParallelStrategy(save_distributed_checkpoint=False).state_kind == "full"


@pytest.mark.proves("4.24")
@pytest.mark.parametrize(
    ("sizes", "devices", "nodes", "found"),
    [
        ({}, 4, 2, {"data_parallel": 2, "tensor_parallel": 4}),  # nodes x devices
        ({}, 1, 1, {"data_parallel": 1, "tensor_parallel": 1}),
        ({"data_parallel_size": 4}, 4, 2, {"data_parallel": 4, "tensor_parallel": 2}),
        ({"tensor_parallel_size": 2}, 4, 2, {"data_parallel": 4, "tensor_parallel": 2}),
        ({"pipeline_parallel_size": 2}, 4, 2, {"pipeline_parallel": 2, "data_parallel": 2, "tensor_parallel": 2}),
        ({"pipeline_parallel_size": 2}, 1, 4, {"pipeline_parallel": 2, "data_parallel": 2, "tensor_parallel": 1}),
    ],
)
def test_auto_sizes_follow_from_nodes_and_devices(
    sizes: dict[str, int], devices: int, nodes: int, found: dict[str, int]
) -> None:
    strategy: Any = ModelParallelStrategy(**sizes)  # type: ignore[arg-type]
    assert strategy._sizes.shape(devices, nodes) == found


@pytest.mark.proves("4.24")
@pytest.mark.parametrize(
    ("sizes", "shown"),
    [
        ({"data_parallel_size": 2, "tensor_parallel_size": 3}, "data_parallel_size=2, tensor_parallel_size=3"),
        ({"data_parallel_size": 3}, "data_parallel_size=3, tensor_parallel_size='auto'"),
        ({"pipeline_parallel_size": 3}, "pipeline_parallel_size=3"),
        ({"data_parallel_size": 1, "tensor_parallel_size": 1}, "data_parallel_size=1, tensor_parallel_size=1"),
    ],
)
def test_a_product_that_is_not_the_number_of_processes_is_refused(sizes: dict[str, Any], shown: str) -> None:
    with pytest.raises(MisconfigurationException) as caught:
        ModelParallelStrategy(**sizes).check_world([torch.device("cpu")] * 4, 1)
    for part in (shown, "4 processes (devices=4, num_nodes=1)", "give sizes whose product is that number"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_parallel_size": 0}, "data_parallel_size=0: give a whole number of at least 1 or 'auto'"),
        ({"tensor_parallel_size": "all"}, "tensor_parallel_size='all'"),
        ({"data_parallel_size": 2.0}, r"data_parallel_size=2\.0"),
        ({"context_parallel_size": "auto"}, "context_parallel_size='auto': give a whole number of at least 1"),
        ({"pipeline_parallel_size": True}, "pipeline_parallel_size=True"),
        ({"parallelize_fn": 2}, "parallelize_fn=2, which cannot be called.*data_parallel_size="),
    ],
)
def test_wrong_sizes_are_refused_before_anything_starts(options: dict[str, Any], message: str) -> None:
    with (
        pytest.raises(MisconfigurationException, match=message)
        if "parallelize_fn" not in options
        else pytest.raises(MisconfigurationTypeError, match=message)
    ):
        ModelParallelStrategy(**options)


def test_a_scaler_and_a_pipeline_are_refused_together() -> None:
    plan: Any = {"scaler": "dynamic"}
    ModelParallelStrategy().check_precision(plan)
    with pytest.raises(MisconfigurationException, match=r"pipeline_parallel_size.*scales losses.*'bf16-mixed'"):
        ModelParallelStrategy(pipeline_parallel_size=2).check_precision(plan)


@pytest.mark.parametrize("name", ["root_device", "collectives", "device_mesh", "data_parallel_rank"])
def test_what_setup_makes_is_unknown_before(name: str) -> None:
    with pytest.raises(RuntimeError, match="setup_environment has run: call it first"):
        getattr(ModelParallelStrategy(), name)


@pytest.mark.proves("4.24")
def test_a_module_that_nobody_would_parallelize_is_refused() -> None:
    class Base(nn.Module):
        def configure_model(self) -> None: ...

    class Own(Base):
        def configure_model(self) -> None: ...

    for module in (Base(), nn.Linear(2, 2)):
        with pytest.raises(MisconfigurationTypeError, match=r"configure_model.*self\.device_mesh.*parallelize_fn"):
            ModelParallelStrategy().check_module(module)
    ModelParallelStrategy().check_module(Own())
    ModelParallelStrategy(by_layers).check_module(Base())
