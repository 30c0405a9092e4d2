"""FSDPStrategy: what its arguments mean, what it refuses, and which modules become units."""

from __future__ import annotations

import datetime
import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import CustomPolicy, ModuleWrapPolicy, size_based_auto_wrap_policy, wrap
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from fulmen_protocols import MisconfigurationException, Topology
from fulmen_strategies import FSDPStrategy
from fulmen_strategies.fsdp import cpu_offload

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = torch.device("cpu")


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.Sequential(Layer(), Layer())
        self.head = nn.Linear(4, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(x)))


TOKENS = torch.tensor([[1, 2, 3]])


def joined(strategy: FSDPStrategy) -> FSDPStrategy:
    strategy.setup_environment(Topology(devices=(CPU,), main_port=0))
    return strategy


@pytest.fixture
def strategies() -> Iterator[list[FSDPStrategy]]:
    """Put strategies here that have joined: they leave at the end."""
    made: list[FSDPStrategy] = []
    yield made
    for strategy in made:
        strategy.teardown()


def units(strategies: list[FSDPStrategy], model: nn.Module | None = None, **options: Any) -> list[str]:
    strategies.append(joined(FSDPStrategy(**options)))
    placed = strategies[-1].place(Net() if model is None else model)
    prefix = "module."
    found = [name.removeprefix(prefix) for name, one in placed.named_modules() if isinstance(one, FSDPModule)]
    placed(TOKENS).sum().backward()
    return [name for name in found if name]


# --- arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.proves("4.17", "4.19", "4.20")
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"sharding_strategy": "FULL"}, ["sharding_strategy='FULL'", "FULL_SHARD", "HYBRID_SHARD"]),
        (
            {"process_group": object(), "device_mesh": (1, 2), "sharding_strategy": "HYBRID_SHARD"},
            ["process_group=", "device_mesh=(replicas, shards)"],
        ),
        ({"sharding_strategy": "HYBRID_SHARD"}, ["'HYBRID_SHARD'", "auto_wrap_policy", "device_mesh=(replicas"]),
        ({"device_mesh": (2, 2)}, ["device_mesh of 2", "'FULL_SHARD'", "sharding_strategy='HYBRID_SHARD'"]),
        ({"device_mesh": (2, 2), "sharding_strategy": "NO_SHARD"}, ["(2, 2)", "'NO_SHARD'", "Remove one"]),
        ({"device_mesh": 4}, ["device_mesh=4", "(replicas, shards)"]),
        ({"state_dict_type": "shards"}, ["state_dict_type='shards'", "'full'", "'sharded'"]),
        ({"auto_wrap_policy": nn.Linear}, ["auto_wrap_policy", "Linear", "set"]),
        ({"auto_wrap_policy": {"Linear"}}, ["auto_wrap_policy", "'Linear'", "classes"]),
        ({"activation_checkpointing_policy": 3}, ["activation_checkpointing_policy=3", "set"]),
        (
            {"activation_checkpointing": Layer, "activation_checkpointing_policy": {Layer}},
            ["activation_checkpointing and", "latter only"],
        ),
        ({"cpu_offload": "yes"}, ["cpu_offload='yes'", "CPUOffloadPolicy"]),
        ({"mixed_precision": "bf16"}, ["mixed_precision='bf16'", "precision="]),
        ({"mixed_precision": MixedPrecision(buffer_dtype=torch.half)}, ["buffer_dtype=torch.float16", "cast"]),
        ({"mixed_precision": MixedPrecision(keep_low_precision_grads=True)}, ["keep_low_precision_grads=True"]),
        ({"use_orig_params": False}, ["use_orig_params=False", "self.parameters()"]),
        ({"limit_all_gathers": False}, ["limit_all_gathers=False", "Leave it out"]),
        ({"backward_prefetch": BackwardPrefetch.BACKWARD_POST}, ["backward_prefetch", "BACKWARD_POST", "Leave it out"]),
        ({"process_group": object()}, ["process_group=", "device_mesh"]),
        ({"param_init_fn": print}, ["param_init_fn=", "reset_parameters"]),
        ({"device_id": 0}, ["device_id=", "devices="]),
        ({"accelerator": "cpu"}, ["accelerator=", "Trainer or Fabric"]),
        ({"sync_module_state": True}, ["'sync_module_state'", "Did you mean 'sync_module_states'"]),
        ({"sync_module_states": "yes"}, ["sync_module_states='yes'", "True or False"]),
        ({"ignored_modules": ["head"]}, ["'head'", "ignored_modules"]),
        ({"reduce_accumulated": "never"}, ["reduce_accumulated='never'", "'once'", "'each'"]),
    ],
)  # fmt: skip
def test_an_argument_that_cannot_be_honoured_is_an_error_that_says_what_to_do(
    options: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises((MisconfigurationException, TypeError)) as caught:
        FSDPStrategy(**options)

    for part in parts:
        assert part in str(caught.value)


@pytest.mark.proves("4.17")
@pytest.mark.parametrize(
    "options",
    [
        {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
        {"sharding_strategy": "full_shard", "use_orig_params": True, "limit_all_gathers": True},
        {"backward_prefetch": BackwardPrefetch.BACKWARD_PRE, "sync_module_states": True, "forward_prefetch": True},
        {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)},
        {"mixed_precision": MixedPrecisionPolicy(reduce_dtype=torch.float32), "cpu_offload": False},
        {"cpu_offload": CPUOffload(offload_params=False), "process_group_backend": "gloo", "timeout": None},
    ],
)
def test_what_lightnings_strategy_takes_is_taken(strategies: list[FSDPStrategy], options: dict[str, Any]) -> None:
    assert units(strategies, **options, auto_wrap_policy={Layer}) == ["layers.0", "layers.1"]


@pytest.mark.proves("4.17")
def test_the_process_group_has_the_backend_and_the_timeout_that_were_given(strategies: list[FSDPStrategy]) -> None:
    strategies.append(joined(FSDPStrategy("gloo", datetime.timedelta(seconds=77))))
    group = dist.group.WORLD
    assert group is not None

    assert dist.get_backend() == "gloo"
    assert group._get_backend(CPU).options._timeout == datetime.timedelta(seconds=77)  # type: ignore[attr-defined]


@pytest.mark.parametrize("asked", [True, CPUOffload(offload_params=True), CPUOffloadPolicy(pin_memory=False)])
@pytest.mark.proves("4.17")
def test_offloading_to_the_cpu_needs_another_device(asked: object) -> None:
    strategy = FSDPStrategy(cpu_offload=asked)  # type: ignore[arg-type]

    with pytest.raises(MisconfigurationException, match=r"cpu_offload.*'cpu'.*accelerator='gpu'"):
        strategy.check_world([CPU], 1)
    strategy.check_world([torch.device("cuda", 0)], 1)


def test_the_strategy_that_offloads_has_a_name_of_its_own() -> None:
    with pytest.raises(MisconfigurationException, match="cpu_offload"):
        cpu_offload().check_world([CPU], 1)


@pytest.mark.proves("4.17", "4.19")
def test_a_mesh_of_another_number_of_processes_is_an_error() -> None:
    strategy = FSDPStrategy(device_mesh=(2, 2), sharding_strategy="HYBRID_SHARD")

    with pytest.raises(MisconfigurationException, match=r"device_mesh=\(2, 2\).*4 processes.*run has 3"):
        strategy.check_world([CPU] * 3, 1)
    strategy.check_world([CPU] * 2, 2)


@pytest.mark.proves("4.18")
def test_the_kind_of_checkpoint_is_the_users_or_the_runs() -> None:
    chosen, open_to_both = FSDPStrategy(state_dict_type="full"), FSDPStrategy()
    for strategy in (chosen, open_to_both):
        strategy.default_state_kind("sharded")

    assert (chosen.state_kind, open_to_both.state_kind) == ("full", "sharded")


def test_a_precision_that_cannot_be_sharded_is_refused() -> None:
    plan: Any = {
        "parameter": torch.float32, "compute": torch.float8_e4m3fn, "reduction": torch.float32,
        "output": torch.float32, "scaler": "none",
    }  # fmt: skip

    with pytest.raises(MisconfigurationException, match=r"FSDPStrategy.*compute.*float8_e4m3fn.*bfloat16"):
        FSDPStrategy().apply_precision_plan(plan)


@pytest.mark.parametrize("name", ["root_device", "collectives", "device_mesh"])
def test_what_needs_processes_says_so(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"{name} of FSDPStrategy is unknown until setup_environment"):
        getattr(FSDPStrategy(), name)


# --- units -------------------------------------------------------------------------------------------------------


def by_torchs_convention(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    return recurse or isinstance(module, Layer)


@pytest.mark.proves("4.17")
@pytest.mark.parametrize(
    "policy",
    [
        {Layer},
        lambda module: isinstance(module, Layer),
        by_torchs_convention,
        ModuleWrapPolicy({Layer}),
        CustomPolicy(lambda module: isinstance(module, Layer)),
    ],
    ids=["set", "function", "torch's convention", "ModuleWrapPolicy", "CustomPolicy"],
)
def test_units_are_what_the_policy_chooses(strategies: list[FSDPStrategy], policy: Any) -> None:
    assert units(strategies, auto_wrap_policy=policy) == ["layers.0", "layers.1"]


def test_a_policy_by_size_counts_what_no_inner_unit_has(strategies: list[FSDPStrategy]) -> None:
    policy = functools.partial(size_based_auto_wrap_policy, min_num_params=32)

    # Two layers of 20 make a unit, embedding and head have 32 each.
    assert units(strategies, auto_wrap_policy=policy) == ["embed", "layers", "head"]


def test_without_a_policy_the_model_is_one_unit(strategies: list[FSDPStrategy]) -> None:
    assert units(strategies) == []


def test_a_policy_with_options_of_its_own_is_refused(strategies: list[FSDPStrategy]) -> None:
    policy = CustomPolicy(lambda module: {"reshard": False} if isinstance(module, Layer) else False)

    with pytest.raises(MisconfigurationException, match="auto_wrap_policy chose the options"):
        units(strategies, auto_wrap_policy=policy)


@pytest.mark.proves("4.20")
def test_wrap_makes_units_where_the_strategy_creates_modules(strategies: list[FSDPStrategy]) -> None:
    strategies.append(joined(FSDPStrategy()))
    with strategies[0].module_context(empty=False):
        model = Net()
        model.layers[0] = wrap(model.layers[0])

    placed = strategies[0].place(model)

    assert [name for name, one in placed.named_modules() if isinstance(one, FSDPModule)] == ["", "module.layers.0"]


@pytest.mark.proves("4.20")
def test_wrap_with_options_is_refused(strategies: list[FSDPStrategy]) -> None:
    strategies.append(joined(FSDPStrategy()))

    with (
        strategies[0].module_context(empty=False),
        pytest.raises(MisconfigurationException, match=r"wrap\(\) got 'cpu_offload'.*FSDPStrategy"),
    ):
        wrap(nn.Linear(2, 2), cpu_offload=True)


@pytest.mark.proves("4.19")
def test_a_policy_is_not_applied_to_a_model_that_is_sharded_already(strategies: list[FSDPStrategy]) -> None:
    strategies.append(joined(FSDPStrategy(auto_wrap_policy={Layer})))
    model = Net()
    fully_shard(model.head)

    with pytest.warns(UserWarning, match="auto_wrap_policy is not applied.*fully_shard"):
        placed = strategies[0].place(model)

    assert [name for name, one in placed.named_modules() if isinstance(one, FSDPModule)] == ["", "module.head"]
    placed(TOKENS).sum().backward()


@pytest.mark.proves("4.19")
def test_units_that_share_a_parameter_are_put_together_and_named(strategies: list[FSDPStrategy]) -> None:
    model = Net()
    model.head.weight = model.embed.weight

    def policy(module: nn.Module) -> bool:
        return isinstance(module, Layer) or module in (model.embed, model.head)

    with pytest.warns(UserWarning, match="embed, head share parameters"):
        assert units(strategies, model, auto_wrap_policy=policy) == ["layers.0", "layers.1"]
    assert model.head.weight is model.embed.weight


@pytest.mark.proves("4.19")
@pytest.mark.parametrize("present", [False, True])
def test_activations_are_recomputed_unless_they_are_already(strategies: list[FSDPStrategy], present: bool) -> None:
    calls: list[int] = []

    class Counting(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return super().forward(x)

    model = Net()
    model.layers = nn.Sequential(Counting(), Counting())
    strategies.append(joined(FSDPStrategy(activation_checkpointing_policy={Counting})))
    strategies[0].place(model)(TOKENS).sum().backward()
    assert len(calls) == 4, "twice for each of two layers"

    if present:
        again = Net()
        again.layers = nn.Sequential(Counting(), Counting())
        again.layers[0].forward = functools.partial(checkpoint, again.layers[0].forward, use_reentrant=False)
        again.layers[0].__dict__["_fulmen_is_recomputed"] = True
        with pytest.warns(UserWarning, match="not applied.*activation checkpointing already"):
            strategies[0].place(again)


@pytest.mark.proves("4.19")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo reads it
def test_layers_that_were_compiled_stay_so_when_their_activations_are_recomputed(
    strategies: list[FSDPStrategy],
) -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(sum(node.op in ("call_function", "call_module") for node in graph.graph.nodes))
        return graph.forward

    torch.manual_seed(0)
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    for layer in model.layers:
        layer.compile(backend=backend)
    strategies.append(joined(FSDPStrategy(activation_checkpointing_policy={Layer}, auto_wrap_policy={Layer})))
    strategies[0].place(model)(TOKENS).sum().backward()
    plain(TOKENS).sum().backward()

    assert compiled
    assert all(compiled), "none of them empty"
    for mine, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.full_tensor(), expected.grad)


@pytest.mark.proves("4.17")
def test_the_older_argument_for_recomputation_still_works(strategies: list[FSDPStrategy]) -> None:
    with pytest.warns(DeprecationWarning, match="activation_checkpointing_policy"):
        strategy = FSDPStrategy(activation_checkpointing=[Layer])
    strategies.append(joined(strategy))

    model = Net()
    strategy.place(model)(TOKENS).sum().backward()

    assert "forward" in model.layers[0].__dict__


def test_ignored_parameters_stay_whole(strategies: list[FSDPStrategy]) -> None:
    model = Net()
    strategies.append(joined(FSDPStrategy(ignored_modules=[model.head])))

    strategies[0].place(model)(TOKENS).sum().backward()

    assert not isinstance(model.head.weight, DTensor)
    assert isinstance(model.embed.weight, DTensor)


# --- modules -----------------------------------------------------------------------------------------------------


@pytest.mark.proves("4.20")
def test_a_model_on_the_meta_device_gets_the_values_of_its_constructor(strategies: list[FSDPStrategy]) -> None:
    torch.manual_seed(3)
    expected = Net().state_dict()
    strategies.append(joined(FSDPStrategy(auto_wrap_policy={Layer})))
    with strategies[0].module_context(empty=True):
        model = Net()
    assert next(model.parameters()).is_meta

    torch.manual_seed(3)
    placed = strategies[0].place(model)

    got = strategies[0].module_state(placed, full=True)
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], value) for name, value in expected.items())  # type: ignore[arg-type]


@pytest.mark.proves("4.23")
def test_leaving_moves_nothing(strategies: list[FSDPStrategy]) -> None:
    moved: list[Any] = []

    class Watched(Net):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:  # every way of moving a module comes through here
            moved.append(fn)
            return super()._apply(fn, recurse)

    strategies.append(joined(FSDPStrategy(auto_wrap_policy={Layer})))
    model = Watched()
    strategies[0].place(model)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    moved.clear()
    strategies[0].teardown()

    assert moved == []
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


@pytest.mark.proves("4.20")
def test_optimizers_made_before_placing_step_the_sharded_parameters(strategies: list[FSDPStrategy]) -> None:
    strategies.append(joined(FSDPStrategy(auto_wrap_policy={Layer})))
    torch.manual_seed(0)
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    optimizers = [torch.optim.Adam(one.parameters(), lr=0.1) for one in (model, plain)]
    for one, optimizer in zip((model, plain), optimizers, strict=True):  # it has state already
        one(TOKENS).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    placed = strategies[0].place(model)
    strategies[0].prepare_optimizers(placed, optimizers[:1])
    for called, optimizer in zip((placed, plain), optimizers, strict=True):
        called(TOKENS).sum().backward()
        optimizer.step()

    got = strategies[0].module_state(placed, full=True)
    assert all(torch.equal(got[name], value) for name, value in plain.state_dict().items())  # type: ignore[arg-type]


def test_a_module_that_was_placed_is_not_sharded_again(strategies: list[FSDPStrategy]) -> None:
    strategies.append(joined(FSDPStrategy()))
    model = Net()

    assert strategies[0].place(model) is strategies[0].place(model)


@pytest.mark.proves("4.20")
def test_a_module_of_torchs_first_fsdp_is_refused(strategies: list[FSDPStrategy]) -> None:
    strategies.append(joined(FSDPStrategy()))
    model = Net()
    # Its constructor wants a GPU; that it is there is all that counts.
    model.layers[0].__class__ = type("Wrapped", (torch.distributed.fsdp.FullyShardedDataParallel,), {})

    with pytest.raises(MisconfigurationException, match=r"layers\.0 is wrapped.*auto_wrap_policy"):
        strategies[0].place(model)


def test_the_next_pass_works_after_one_that_failed(strategies: list[FSDPStrategy]) -> None:
    strategies.append(joined(FSDPStrategy(auto_wrap_policy={Layer})))
    placed = strategies[0].place(Net())
    with pytest.raises(IndexError):
        strategies[0].bind_method(placed, "forward")(torch.tensor([[99]]))

    placed(TOKENS).sum().backward()

    assert all(parameter.grad is not None for parameter in placed.parameters())


def test_a_module_that_was_not_placed_is_an_error(strategies: list[FSDPStrategy]) -> None:
    strategies.append(joined(FSDPStrategy()))

    with pytest.raises(TypeError, match=r"Linear that it has not placed.*place\(\) first"):
        strategies[0].module_state(nn.Linear(1, 1), full=True)


def test_weights_are_gathered_in_the_users_dtype_and_kept_in_their_own(strategies: list[FSDPStrategy]) -> None:
    strategies.append(joined(FSDPStrategy(mixed_precision=MixedPrecisionPolicy(param_dtype=torch.bfloat16))))
    seen: list[torch.dtype] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].register_forward_pre_hook(lambda layer, _: seen.append(layer.weight.dtype))

    strategies[0].place(model)(torch.randn(3, 4)).sum().backward()

    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}  # type: ignore[union-attr]
