"""What people import from ``utilities``: each name is there, and does what they rely on."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

import fulmen
from fulmen import utilities
from fulmen.utilities import types
from fulmen.utilities.apply_func import convert_tensors_to_scalars, move_data_to_device
from fulmen.utilities.data import AttributeDict, extract_batch_size, has_iterable_dataset, has_len, sized_len
from fulmen.utilities.distributed import (
    DistributedSamplerWrapper,
    UnrepeatedDistributedSampler,
    UnrepeatedDistributedSamplerWrapper,
    _IndexBatchSamplerWrapper,
    is_shared_filesystem,
)
from fulmen.utilities.enums import GradClipAlgorithmType, LightningEnum
from fulmen.utilities.exceptions import MisconfigurationException, SIGTERMException, TrainingSpikeException
from fulmen.utilities.grads import grad_norm
from fulmen.utilities.memory import garbage_collection_cuda, is_oom_error, recursive_detach
from fulmen.utilities.model_helpers import get_torchvision_model, is_overridden
from fulmen.utilities.parameter_tying import find_shared_parameters, set_shared_parameters
from fulmen.utilities.parsing import get_init_args, is_picklable
from fulmen.utilities.rank_zero import (
    LightningDeprecationWarning,
    WarningCache,
    rank_zero_deprecation,
    rank_zero_only,
)
from fulmen.utilities.seed import isolate_rng, pl_worker_init_function, seed_everything
from fulmen.utilities.warnings import PossibleUserWarning
from fulmen_protocols import MissingPackage

# Where people who come from Lightning look for each name.
PLACES = {
    "apply_func": ["convert_tensors_to_scalars", "move_data_to_device"],
    "combined_loader": ["CombinedLoader"],
    "data": [
        "AttributeDict", "extract_batch_size", "has_iterable_dataset", "has_len", "sized_len",
        "suggested_max_num_workers",
    ],
    "distributed": [
        "DistributedSamplerWrapper", "UnrepeatedDistributedSampler", "UnrepeatedDistributedSamplerWrapper",
        "_IndexBatchSamplerWrapper", "is_shared_filesystem",
    ],
    "enums": ["GradClipAlgorithmType", "LightningEnum"],
    "exceptions": ["MisconfigurationException", "SIGTERMException", "TrainingSpikeException"],
    "grads": ["grad_norm"],
    "memory": ["garbage_collection_cuda", "is_oom_error", "recursive_detach"],
    "model_helpers": ["get_torchvision_model", "is_overridden"],
    "model_summary": ["ModelSummary", "summarize"],
    "parameter_tying": ["find_shared_parameters", "set_shared_parameters"],
    "parsing": ["AttributeDict", "is_picklable"],
    "rank_zero": [
        "LightningDeprecationWarning", "WarningCache", "rank_prefixed_message", "rank_zero_debug",
        "rank_zero_deprecation", "rank_zero_info", "rank_zero_only", "rank_zero_warn",
    ],
    "seed": ["isolate_rng", "pl_worker_init_function", "reset_seed", "seed_everything"],
    "types": ["EVAL_DATALOADERS", "LRSchedulerConfig", "OptimizerLRScheduler", "STEP_OUTPUT", "TRAIN_DATALOADERS"],
    "warnings": ["PossibleUserWarning", "disable_possible_user_warnings"],
}  # fmt: skip


@pytest.mark.proves("13.10", "13.11", "13.12", "13.13", "13.14", "13.15")
@pytest.mark.parametrize("module", PLACES)
def test_each_name_is_where_people_look_for_it(module: str) -> None:
    found = importlib.import_module(f"fulmen.utilities.{module}")
    assert [name for name in PLACES[module] if not hasattr(found, name)] == []


@pytest.mark.proves("13.14")
def test_the_package_has_the_names_that_are_imported_from_it_and_imports_none_of_them_by_itself() -> None:
    for name in utilities.__all__:
        assert getattr(utilities, name) is getattr(importlib.import_module(utilities._HOME[name]), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = utilities.nothing  # type: ignore[attr-defined]  # there is none
    code = "import sys, fulmen.utilities; sys.exit('fulmen.hparams' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------------- loaders and samplers


def batches(count: int) -> list[int]:
    return list(range(count))


@pytest.mark.proves("13.10")
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [([0, 0], 0, 0), ([1, 1], 1, 0)]),
        ("max_size_cycle", [([0, 0], 0, 0), ([1, 1], 1, 0), ([0, 2], 2, 0)]),
        ("max_size", [([0, 0], 0, 0), ([1, 1], 1, 0), ([None, 2], 2, 0)]),
        ("sequential", [(0, 0, 0), (1, 1, 0), (0, 0, 1), (1, 1, 1), (2, 2, 1)]),
    ],
)
def test_a_combined_loader_gives_batch_batch_idx_and_dataloader_idx(mode: Any, expected: list[Any]) -> None:
    loaders = [DataLoader(batches(size), batch_size=None) for size in (2, 3)]  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
    combined = utilities.CombinedLoader(loaders, mode)
    iter(combined)

    assert len(combined) == len(expected)
    assert list(combined) == expected
    assert combined.flattened == combined.iterables == loaders
    assert [type(sampler) for sampler in combined.sampler] == [SequentialSampler] * 2  # type: ignore[attr-defined]  # its type does not say so
    assert combined.batch_sampler == [None, None]
    combined.limits = 1
    assert combined.limits == [1, 1]
    assert len(list(combined)) == (2 if mode == "sequential" else 1)


@pytest.mark.proves("13.10")
def test_a_combined_loader_walks_nested_collections_and_can_be_resumed() -> None:
    def combined() -> utilities.CombinedLoader:
        def loader(size: int) -> DataLoader[Any]:
            return DataLoader(batches(size), batch_size=None)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset

        return utilities.CombinedLoader({"a": loader(4), "b": [loader(4), (loader(4),)]}, "max_size")

    first = iter(combined())
    seen = [next(first), next(first)]
    assert seen[1] == ({"a": 1, "b": [1, (1,)]}, 1, 0)

    second = combined()
    second.load_state_dict(first.state_dict())
    assert list(second) == [({"a": i, "b": [i, (i,)]}, i, 0) for i in (2, 3)]


@pytest.mark.proves("13.10")
def test_a_combined_loader_without_a_known_length_says_so_and_refuses_an_unknown_mode() -> None:
    with pytest.raises(TypeError, match="no length"):
        len(utilities.CombinedLoader([iter([1])], "min_size"))
    with pytest.raises(MisconfigurationException, match=r"mode='max'.*Allowed: 'min_size'"):
        utilities.CombinedLoader([[1]], "max")  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.proves("13.11")
def test_samplers_for_ranks_split_the_data_and_the_unrepeated_ones_repeat_nothing() -> None:
    order = [4, 2, 0, 1, 3]
    assert [list(UnrepeatedDistributedSampler(range(5), 2, rank)) for rank in range(2)] == [[0, 2, 4], [1, 3]]
    parts = [list(UnrepeatedDistributedSamplerWrapper(order, 2, rank)) for rank in range(2)]
    assert parts == [[4, 0, 3], [2, 1]]
    assert [list(DistributedSamplerWrapper(order, 2, rank)) for rank in range(2)] == [[4, 0, 3], [2, 1, 4]]


@pytest.mark.proves("13.11")
def test_samplers_that_are_told_no_rank_ask_torch_distributed() -> None:
    script = """
import torch.distributed as dist
from fulmen.utilities.distributed import DistributedSamplerWrapper, UnrepeatedDistributedSampler
assert list(DistributedSamplerWrapper([3, 1, 2, 0])) == [3, 1, 2, 0]
dist.init_process_group("fake", rank=1, world_size=2)
assert list(DistributedSamplerWrapper([3, 1, 2, 0])) == [1, 0]
assert list(UnrepeatedDistributedSampler(range(5))) == [1, 3]
"""
    fake = "import torch.testing._internal.distributed.fake_pg"
    subprocess.run([sys.executable, "-W", "ignore", "-c", fake + script], check=True, timeout=120)


@pytest.mark.proves("13.11")
def test_a_wrapped_batch_sampler_remembers_the_indices_of_each_batch() -> None:
    wrapper = _IndexBatchSamplerWrapper(BatchSampler(SequentialSampler(range(5)), 2, drop_last=False))
    for _ in range(2):
        assert list(wrapper) == wrapper.seen_batch_indices == [[0, 1], [2, 3], [4]]
    assert (len(wrapper), wrapper.batch_size, wrapper.drop_last) == (3, 2, False)


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


class SizedStream(Stream):
    def __len__(self) -> int:
        return 3


@pytest.mark.proves("13.11")
def test_loaders_are_asked_for_their_length_and_kind() -> None:
    plain, stream, sized = DataLoader([1, 2, 3]), DataLoader(Stream()), DataLoader(SizedStream())  # type: ignore[arg-type, var-annotated]  # torch takes any sequence; its annotation names only Dataset

    assert [sized_len(loader) for loader in (plain, stream, sized, iter([1]))] == [3, None, 3, None]
    assert [has_len(loader) for loader in (plain, stream, sized, [])] == [True, False, True, True]
    assert [has_iterable_dataset(loader) for loader in (plain, stream, sized, [1])] == [False, True, True, False]


@pytest.mark.proves("13.11")
def test_the_size_of_a_batch_is_that_of_its_first_tensor() -> None:
    assert extract_batch_size(torch.zeros(4, 2)) == 4
    assert extract_batch_size(torch.tensor(1.0)) == 1
    assert extract_batch_size({"text": ["a"], "x": (torch.zeros(3),)}) == 3
    with pytest.warns(UserWarning, match="first dimension 2 and 3; 2, the first"):
        assert extract_batch_size([torch.zeros(2), torch.zeros(3)]) == 2
    with pytest.raises(MisconfigurationException, match=r"no tensor.*dict.*Pass batch_size="):
        extract_batch_size({"a": "text"})


# ---------------------------------------------------------------------- random numbers


class Draws(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return torch.rand(1)


class Plain(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.init_functions: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.init_functions.append(self.trainer.train_dataloader.worker_init_fn)
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def restored_seed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Leaves random states and the seed's variables as they were."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # so that it is undone, whatever the test sets
        monkeypatch.delenv(name)
    with isolate_rng():
        yield


@pytest.mark.proves("13.12")
@pytest.mark.parametrize("workers", [True, False])
@pytest.mark.usefixtures("restored_seed")
def test_the_trainer_seeds_workers_if_seed_everything_was_asked_to(workers: bool) -> None:
    assert seed_everything(3, workers=workers, verbose=False) == 3
    model = Plain()
    fulmen.Trainer(accelerator="cpu", barebones=True, max_epochs=1).fit(model, DataLoader(Draws(), batch_size=4))

    (used,) = model.init_functions
    if workers:
        assert used.func is pl_worker_init_function
        assert used.keywords == {"rank": 0}
    else:
        assert used is None


@pytest.mark.proves("13.12")
@pytest.mark.usefixtures("restored_seed")
def test_the_worker_function_mixes_base_seed_worker_and_rank() -> None:
    def draw(base: int, worker: int, rank: int) -> float:
        torch.manual_seed(base + worker)  # as a DataLoader does in its worker
        pl_worker_init_function(worker, rank)
        return torch.rand(1, dtype=torch.float64).item()

    places = [(base, worker, rank) for base in (1, 2) for worker in (0, 1) for rank in (0, 1)]
    assert len({draw(*place) for place in places}) == len(places)
    assert draw(1, 0, 1) == draw(1, 0, 1)


@pytest.mark.proves("13.12")
@pytest.mark.usefixtures("restored_seed")
def test_isolation_gives_every_generator_its_state_back_also_after_an_error() -> None:
    import random

    import numpy as np

    def draws() -> list[float]:
        return [torch.rand(1).item(), random.random(), float(np.random.rand())]

    seed_everything(1, verbose=False)
    expected = draws()
    seed_everything(1, verbose=False)

    def fail() -> None:
        with isolate_rng(include_cuda=False):
            draws()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert draws() == expected


# ---------------------------------------------------------------------- rank zero


@pytest.mark.proves("13.13")
def test_the_rank_is_an_attribute_that_can_be_set_and_is_else_read_in_the_launchers_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    before = rank_zero_only._rank
    rank_zero_only.rank = None  # type: ignore[assignment]  # replaced on purpose
    try:
        assert rank_zero_only.rank == 0
        for rank, name in enumerate(reversed(names), start=1):
            monkeypatch.setenv(name, str(rank))
            assert rank_zero_only.rank == rank

        called: list[int] = []
        for rank_zero_only.rank in (0, 1):
            assert rank_zero_only(called.append)(rank_zero_only.rank) is None
            assert rank_zero_only(lambda: "zero", default="other")() == ("zero", "other")[rank_zero_only.rank]
        assert called == [0]
    finally:
        rank_zero_only.rank = before  # type: ignore[assignment]  # replaced on purpose


@pytest.mark.proves("13.13")
def test_a_warning_cache_is_the_set_of_what_was_said() -> None:
    cache = WarningCache()
    with pytest.warns(UserWarning, match="once"):
        cache.warn("once")
    cache.warn("once")  # a warning would be an error here
    with pytest.warns(PossibleUserWarning, match="perhaps"):
        cache.warn("perhaps", category=PossibleUserWarning)
    assert cache == {"once", "perhaps"}
    cache.clear()
    with pytest.warns(LightningDeprecationWarning, match="once"):
        cache.deprecation("once")
    with pytest.warns(LightningDeprecationWarning, match="going"):
        rank_zero_deprecation("going")


# ---------------------------------------------------------------------- models


class Model(fulmen.LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.proves("13.14")
def test_is_overridden_looks_through_partials_decorators_and_instances() -> None:
    def decorated(function: Any) -> Any:
        @wraps(function)
        def call(*args: Any) -> Any:
            return function(*args)

        return call

    model = Model()
    assert is_overridden("training_step", model)
    assert not is_overridden("validation_step", model)
    assert not is_overridden("training_step", None)
    model.on_fit_start = decorated(model.on_fit_start)  # type: ignore[method-assign]  # replaced on purpose
    assert not is_overridden("on_fit_start", model)
    model.on_fit_end = partial(Model.on_fit_end, model)  # type: ignore[method-assign]  # replaced on purpose
    assert not is_overridden("on_fit_end", model)
    model.on_fit_end = lambda: None  # type: ignore[method-assign]  # replaced on purpose
    assert is_overridden("on_fit_end", model)

    class Data(fulmen.LightningDataModule):
        def prepare_data(self) -> None:
            pass

    class Watching(fulmen.Callback):
        def on_train_end(self, *_: Any) -> None:
            pass

    assert is_overridden("prepare_data", Data())
    assert not is_overridden("setup", Data())
    assert is_overridden("on_train_end", Watching())
    assert is_overridden("run", type("B", (threading.Thread,), {"run": lambda self: None})(), threading.Thread)
    with pytest.raises(ValueError, match=r"got a SimpleNamespace, which is none of LightningModule.*as parent"):
        is_overridden("x", SimpleNamespace())
    with pytest.raises(ValueError, match="Thread has no such method"):
        is_overridden("name2", SimpleNamespace(name2=print), threading.Thread)


@pytest.mark.proves("13.14")
@pytest.mark.parametrize(("norm_type", "key"), [(2, "2.0"), (1.0, "1.0"), ("inf", "inf")])
def test_gradient_norms_are_those_of_the_gradients_laid_end_to_end(norm_type: Any, key: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False), nn.Linear(1, 1))
    model[:2](torch.randn(4, 3)).sum().backward()

    norms = grad_norm(model, norm_type, group_separator="|")

    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(norms) == [*(f"grad_{key}_norm|{name}" for name in gradients), f"grad_{key}_norm_total"]
    for name, gradient in gradients.items():
        assert norms[f"grad_{key}_norm|{name}"].item() == pytest.approx(
            gradient.flatten().norm(float(norm_type)).item()
        )
    whole = torch.cat([gradient.flatten() for gradient in gradients.values()])
    assert norms[f"grad_{key}_norm_total"].item() == pytest.approx(whole.norm(float(norm_type)).item())
    assert "grad_2.0_norm/0.weight" in grad_norm(model, 2)


@pytest.mark.proves("13.14")
def test_gradient_norms_of_sparse_gradients_and_of_none() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    assert grad_norm(table, 2) == {}
    table(torch.tensor([1, 1, 3])).sum().backward()
    assert grad_norm(table, 2)["grad_2.0_norm_total"].item() == pytest.approx((4 * 2 + 1 * 2) ** 0.5)
    for wrong in (0, -1, "many"):
        with pytest.raises(ValueError, match=rf"norm_type={wrong!r} must be a positive number or 'inf'"):
            grad_norm(table, wrong)


@pytest.mark.proves("13.14")
def test_shared_parameters_are_found_and_tied_again() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.second = nn.Linear(2, 2)
            self.second.weight = self.first.weight
            self.inner = nn.Sequential(nn.Linear(2, 2), nn.Identity())
            self.again = self.inner

    model = Tied()
    groups = find_shared_parameters(model)
    assert groups == [
        ["first.weight", "second.weight"],
        ["inner.0.weight", "again.0.weight"],
        ["inner.0.bias", "again.0.bias"],
    ]

    model.second.weight = nn.Parameter(torch.zeros(2, 2))
    assert len(find_shared_parameters(model)) == 2
    assert set_shared_parameters(model, groups) is model
    assert model.second.weight is model.first.weight
    assert find_shared_parameters(model) == groups


@pytest.mark.proves("13.14")
def test_data_moves_to_a_device_in_nested_collections_and_by_an_objects_own_method() -> None:
    class Own:
        device = None

        def to(self, device: torch.device) -> None:
            self.device = device

    own = Own()
    batch = {"x": [torch.ones(2), (torch.ones(1), "text")], "own": own}
    moved = move_data_to_device(batch, torch.device("meta"))

    assert moved["x"][0].device.type == moved["x"][1][0].device.type == "meta"  # type: ignore[index,union-attr]  # known to be there
    assert moved["x"][1][1] == "text"  # type: ignore[index]  # known to be there
    assert moved["own"] is own
    assert str(own.device) == "meta"


@pytest.mark.proves("13.14")
def test_tensors_become_numbers_or_are_detached() -> None:
    assert convert_tensors_to_scalars({"a": torch.tensor(2.5), "b": [torch.tensor([3])]}) == {"a": 2.5, "b": [3]}
    with pytest.raises(ValueError, match=r"shape \(2,\) is no scalar"):
        convert_tensors_to_scalars({"a": torch.ones(2)})

    attached = torch.ones(2, requires_grad=True) * 2
    detached = recursive_detach({"a": attached, "b": [attached, "text"]}, to_cpu=True)
    assert not detached["a"].requires_grad
    assert not detached["b"][0].requires_grad
    assert detached["b"][1] == "text"
    assert attached.requires_grad


@pytest.mark.proves("13.14")
def test_running_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as host:
        torch.empty(1 << 60)
    assert is_oom_error(host.value), "what torch itself raises"
    for message in (
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input.",
    ):
        assert is_oom_error(RuntimeError(message))
    assert is_oom_error(torch.OutOfMemoryError("HIP out of memory"))
    for other in (RuntimeError("shape mismatch"), ValueError("CUDA out of memory"), KeyError("x"), RuntimeError()):
        assert not is_oom_error(other)
    garbage_collection_cuda()


@pytest.mark.proves("13.14")
def test_an_attribute_dict_is_a_dict_whose_items_are_attributes() -> None:
    state = AttributeDict(model="m", step=1)
    state.step += 1
    state["new"] = 3
    assert (state.step, state.new, state["model"]) == (2, 3, "m")
    del state.new
    assert dict(state) == {"model": "m", "step": 2}
    with pytest.raises(AttributeError, match=r"'stap'.*Did you mean 'step'"):
        _ = state.stap
    assert isinstance(state, dict)
    assert "step" in repr(state)


@pytest.mark.proves("13.14")
def test_enumerations_are_strings_and_found_by_name_or_value() -> None:
    assert GradClipAlgorithmType.NORM == "norm" == GradClipAlgorithmType("norm")
    assert GradClipAlgorithmType.supported_types() == ["value", "norm"]
    assert GradClipAlgorithmType.supported_type("value")
    assert not GradClipAlgorithmType.supported_type("median")

    class Kind(LightningEnum):
        MY_KEY = "a-value"

    assert Kind.MY_KEY == "A-Value"
    assert {Kind.MY_KEY: 1}["a-value"] == 1  # type: ignore[index]  # known to be there
    assert Kind.from_str("my-key") is Kind.from_str("A-VALUE", source="any") is Kind.MY_KEY
    assert Kind.try_from_str("a-value") is None
    with pytest.raises(ValueError, match=r"Kind has no member 'my_ky'. Did you mean 'MY_KEY'"):
        Kind.from_str("my_ky")


@pytest.mark.proves("13.14")
def test_what_pickle_cannot_store_is_found_out() -> None:
    assert is_picklable({"a": torch.ones(2)})
    for wrong in (lambda: None, threading.Lock(), (i for i in range(2))):
        assert not is_picklable(wrong)


@pytest.mark.proves("13.14")
def test_workers_share_the_cores_and_leave_one_to_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, processes, expected in ((16, 1, 15), (16, 4, 3), (4, 4, 1), (1, 1, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert utilities.suggested_max_num_workers(processes) == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert utilities.suggested_max_num_workers(2) == 2
    with pytest.raises(ValueError, match="local_world_size=0 must be at least 1"):
        utilities.suggested_max_num_workers(0)


@pytest.mark.proves("13.14")
def test_torchvision_models_are_made_by_name_or_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("torchvision") is not None:
        assert isinstance(get_torchvision_model("resnet18", weights=None), nn.Module)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingPackage, match=r"get_torchvision_model\('resnet18'\) needs.*pip install torchvision"):
        get_torchvision_model("resnet18")


@pytest.mark.proves("13.14")
def test_one_process_sees_its_own_files() -> None:
    alone = SimpleNamespace(world_size=1)
    assert is_shared_filesystem(alone)  # type: ignore[arg-type]  # a stand-in
    assert is_shared_filesystem(SimpleNamespace(world_size=2), "s3://bucket/path")  # type: ignore[arg-type]  # a stand-in


def test_the_types_of_hooks_can_be_used_in_annotations() -> None:
    assert {torch.Tensor, type(None)} <= set(get_args(types.STEP_OUTPUT))
    assert {torch.optim.Optimizer, type(None), types.OptimizerConfig} <= set(get_args(types.OptimizerLRScheduler))


# ---------------------------------------------------------------------- exceptions


@pytest.mark.proves("13.15")
def test_exceptions_are_what_people_catch() -> None:
    assert issubclass(MisconfigurationException, ValueError)
    assert issubclass(SIGTERMException, SystemExit)
    assert issubclass(TrainingSpikeException, RuntimeError)
    with pytest.raises(SystemExit) as ended:
        raise SIGTERMException("asked to end")
    assert ended.value.code == 143
    code = "from fulmen.utilities.exceptions import SIGTERMException; raise SIGTERMException('asked to end')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 143


@pytest.mark.proves("13.15")
@pytest.mark.skipif(importlib.util.find_spec("fulmen.tuner") is None, reason="there is no tuner")
def test_the_tuners_exception_is_imported_from_the_same_place() -> None:
    from fulmen.utilities import exceptions

    assert issubclass(exceptions._TunerExitException, Exception)


def test_collections_keep_their_kind_when_tensors_are_detached() -> None:
    assert type(recursive_detach(OrderedDict(a=torch.ones(1)))) is OrderedDict


def test_a_constructor_can_ask_what_it_was_given() -> None:
    class Base:
        def __init__(self, width: int, *rest: int, depth: int = 2, **more: str) -> None:
            super().__init__()
            frame = inspect.currentframe()
            assert frame is not None
            self.given = get_init_args(frame)

    def no_constructor() -> dict[str, object]:
        frame = inspect.currentframe()
        assert frame is not None
        return get_init_args(frame)

    assert Base(3, 4, name="x").given == {"width": 3, "depth": 2, "name": "x"}
    assert no_constructor() == {}
