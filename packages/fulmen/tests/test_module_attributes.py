"""What a LightningModule is without a run, and what it asks of the run it belongs to."""

from __future__ import annotations

import copy
import pickle
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fulmen.module import LightningModule
from fulmen_protocols import MisconfigurationException


class Recorder:
    """A metric store as the module sees it."""

    def __init__(self) -> None:
        self.logged: list[tuple[Any, ...]] = []

    def log(self, *arguments: Any, module: nn.Module) -> None:
        self.logged.append((*arguments, module))


@dataclass
class StandIn:
    """What a module reads of a Trainer."""

    current_epoch: int = 3
    global_step: int = 7
    global_rank: int = 1
    local_rank: int = 2
    barebones: bool = False
    loggers: list[Any] = field(default_factory=lambda: ["first", "second"])
    printed: list[Any] = field(default_factory=list)

    def print(self, *args: Any) -> None:
        self.printed.append(args)


class Tiny(LightningModule):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Nested(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Sequential(Tiny()), Tiny())


@pytest.mark.proves("10.18")
def test_without_a_trainer_it_counts_nothing_and_says_how_to_get_one() -> None:
    module = Tiny()

    assert (module.current_epoch, module.global_step, module.global_rank, module.local_rank) == (0, 0, 0, 0)
    assert (module.logger, module.loggers, module.fabric, module.device_mesh) == (None, [], None, None)
    with pytest.raises(RuntimeError, match="Tiny is not attached to a Trainer"):
        _ = module.trainer
    assert not hasattr(module, "unknown_attribute")


@pytest.mark.proves("10.18")
def test_modules_inside_it_get_its_trainer_however_deep() -> None:
    module, trainer = Nested(), StandIn()
    module.trainer = trainer  # type: ignore[assignment]  # a stand-in

    inner = module.blocks[0][0]  # type: ignore[index]  # known to be there
    assert inner.trainer is module.trainer is trainer
    assert (inner.current_epoch, inner.global_step, inner.global_rank, inner.local_rank) == (3, 7, 1, 2)
    assert (inner.logger, inner.loggers) == ("first", ["first", "second"])
    module.trainer = None
    with pytest.raises(RuntimeError):
        _ = inner.trainer


@pytest.mark.proves("10.19")
def test_printing_goes_through_the_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    module, trainer = Tiny(), StandIn()
    module.print("alone")
    module.trainer = trainer  # type: ignore[assignment]  # a stand-in
    module.print("together", 1)

    assert capsys.readouterr().out == "alone\n"
    assert trainer.printed == [("together", 1)]


# -- where it lives ----------------------------------------------------------------------------------------------------


@pytest.mark.proves("10.18")
def test_device_and_dtype_are_those_of_the_weights_whoever_moved_them() -> None:
    module = Nested()
    assert (module.device, module.dtype) == (torch.device("cpu"), torch.float32)

    module.blocks.to("meta")  # not through the module itself
    assert module.device == torch.device("meta")
    module.blocks.half()
    assert module.dtype is torch.float16
    assert module.to(torch.float64).dtype is torch.float64
    assert not module.on_gpu


def test_integer_buffers_do_not_count_as_its_dtype() -> None:
    module = LightningModule()
    module.register_buffer("count", torch.zeros(1, dtype=torch.long))
    assert module.dtype is torch.float32
    module.register_buffer("scale", torch.zeros(1, dtype=torch.float64))
    assert module.dtype is torch.float64


@pytest.mark.proves("10.18")
def test_a_module_without_tensors_remembers_where_it_was_moved() -> None:
    module = LightningModule()
    parent = nn.Sequential(module, nn.Linear(1, 1))

    parent.to("meta")
    parent.to(torch.bfloat16)

    assert (module.device, module.dtype) == (torch.device("meta"), torch.bfloat16)


def test_the_device_it_is_about_to_get_is_known_before() -> None:
    module = Tiny()
    module.__dict__["_target_device"] = torch.device("meta")
    assert module.device == torch.device("meta")


# -- logging -----------------------------------------------------------------------------------------------------------


@pytest.mark.proves("6.10")
def test_log_hands_everything_to_the_store_of_the_run() -> None:
    module, store = Tiny(), Recorder()
    module.__dict__["_metric_store"] = store
    value = torch.tensor(1.0)

    module.log("a", value)
    module.log("b", 2, True, False, True, False, "max", False, True, "group", False, 8, "metric", True)
    module.log("c", 3, batch_size=4, on_epoch=True)

    assert store.logged == [
        ("a", value, False, None, None, None, "mean", False, None, True, None, None, False, module),
        ("b", 2, True, False, True, False, "max", True, "group", False, 8, "metric", True, module),
        ("c", 3, False, None, None, True, "mean", False, None, True, 4, None, False, module),
    ]


@pytest.mark.proves("6.10")
def test_log_dict_logs_every_item_with_the_same_options() -> None:
    module, store = Tiny(), Recorder()
    module.__dict__["_metric_store"] = store

    module.log_dict({"a": 1, "b": 2}, prog_bar=True, batch_size=3, rank_zero_only=True)

    assert [entry[:3] for entry in store.logged] == [("a", 1, True), ("b", 2, True)]
    assert all(entry[10] == 3 and entry[12] is True for entry in store.logged)


@pytest.mark.proves("6.10")
def test_log_dict_takes_a_metric_collection_with_its_own_names() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    from torchmetrics import MeanMetric, MetricCollection

    del torchmetrics
    module, store = Tiny(), Recorder()
    module.__dict__["_metric_store"] = store
    metrics = MetricCollection({"mean": MeanMetric()}, prefix="val_")

    module.log_dict(metrics)  # type: ignore[arg-type]  # a stand-in

    assert [(entry[0], entry[1]) for entry in store.logged] == [("val_mean", metrics["mean"])]


def test_logging_without_a_trainer_warns_once_and_is_ignored() -> None:
    module = Tiny()
    with pytest.warns(UserWarning, match="not attached to a Trainer") as warned:
        module.log("a", 1)
    assert warned[0].filename == __file__
    module.log("a", 1)  # a second warning would be an error
    module.log("b", 1)


def test_logging_outside_of_a_run_is_an_error_and_in_a_bare_one_is_ignored() -> None:
    module = Tiny()
    module.trainer = StandIn()  # type: ignore[assignment]  # a stand-in
    with pytest.raises(MisconfigurationException, match="outside of a run"):
        module.log("a", 1)
    module.trainer = StandIn(barebones=True)  # type: ignore[assignment]  # a stand-in
    with pytest.warns(UserWarning, match="barebones=True"):
        module.log("a", 1)


@pytest.mark.proves("6.28")
@pytest.mark.proves("8.20")
def test_under_a_fabric_values_go_to_its_loggers_at_once() -> None:
    class FabricStandIn:
        global_rank, local_rank, world_size = 1, 0, 2
        logged: list[dict[str, Any]] = []  # noqa: RUF012
        loggers = ["one"]  # noqa: RUF012

        def log_dict(self, metrics: dict[str, Any]) -> None:
            self.logged.append(metrics)

        def print(self, *args: Any) -> None: ...

    module, fabric = Nested(), FabricStandIn()
    module.fabric = fabric  # type: ignore[assignment]  # a stand-in
    inner: Any = module.blocks[1]

    inner.log("a", torch.tensor(2.0, requires_grad=True))
    module.log_dict({"b": 1})

    assert [list(logged) for logged in fabric.logged] == [["a"], ["b"]]
    assert not fabric.logged[0]["a"].requires_grad
    assert (inner.fabric, inner.global_rank, inner.loggers) == (fabric, 1, ["one"])
    assert module.trainer.world_size == 2
    with pytest.raises(AttributeError, match="under a Fabric"):
        _ = module.trainer.max_epochs
    with pytest.raises(ValueError, match="got a dict"):
        module.log("c", {"a": 1})


@pytest.mark.proves("6.10")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at every input's
def test_a_compiled_step_logs_and_keeps_its_graphs_free_of_it() -> None:
    class Logging(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self(batch).sum()
            self.log("loss", loss)
            return loss * 2

    module, store = Logging(), Recorder()
    module.__dict__["_metric_store"] = store
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    try:
        compiled = torch.compile(module.training_step, backend=backend)
        for _ in range(3):
            batch = torch.randn(4, 2)
            assert torch.allclose(compiled(batch, 0), module(batch).sum() * 2)
    finally:
        torch.compiler.reset()

    assert [entry[0] for entry in store.logged] == ["loss"] * 3
    assert len(graphs) == 2, "one before the log and one after it, compiled once"


# -- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.proves("10.20")
@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_leave_the_run_behind(how: Any) -> None:
    module = Nested()
    module.trainer = sys  # type: ignore[assignment]  # neither can be copied
    for part in (module, module.blocks[1]):
        part.__dict__["_metric_store"] = sys
    module.example_input_array = torch.ones(2)

    clone = how(module)

    assert clone._trainer is None
    assert clone.blocks[1]._trainer is None
    assert "_metric_store" not in clone.__dict__
    assert torch.equal(clone.example_input_array, torch.ones(2))
    for got, expected in zip(clone.parameters(), module.parameters(), strict=True):
        assert torch.equal(got, expected)
        assert got is not expected
    assert module.trainer is sys


# -- what users define -------------------------------------------------------------------------------------------------


def test_a_missing_step_is_named() -> None:
    for step, method in (("training_step", "fit"), ("validation_step", "validate"), ("test_step", "test")):
        with pytest.raises(MisconfigurationException, match=f"Tiny does not define {step}.*to {method} it"):
            getattr(Tiny(), step)(None, 0)
    with pytest.raises(MisconfigurationException, match=r"Tiny\.train_dataloader\(\) was called"):
        Tiny().train_dataloader()


def test_prediction_is_the_forward_pass_by_default() -> None:
    module = Tiny()
    batch = torch.randn(3, 2)

    assert torch.equal(module.predict_step(batch, 0), module(batch))
    assert torch.equal(module.predict_step(batch=batch, batch_idx=0), module(batch))


@pytest.mark.proves("10.19")
def test_freezing_and_unfreezing() -> None:
    module = Tiny()

    assert module.freeze() is module
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.layer.training
    assert module.unfreeze() is module
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert module.layer.training


@pytest.mark.proves("10.16")
def test_batches_are_moved_with_their_structure() -> None:
    from collections import OrderedDict, defaultdict, namedtuple

    @dataclass
    class Item:
        x: Tensor
        label: str

    class MovesInPlace:
        device = "cpu"

        def to(self, device: torch.device) -> None:
            self.device = str(device)

    Pair = namedtuple("Pair", "a b")
    one = torch.ones(1)
    own = MovesInPlace()
    batch = {
        "list": [one, (one, "text")],
        "pair": Pair(one, 3),
        "ordered": OrderedDict(x=one),
        "default": defaultdict(list, x=one),
        "item": Item(one, "cat"),
        "own": own,
        "none": None,
        "class": MovesInPlace,
    }

    moved = Tiny().transfer_batch_to_device(batch, torch.device("meta"), 0)

    assert moved["list"][0].is_meta
    assert moved["list"][1][0].is_meta
    assert moved["list"][1][1] == "text"
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].a.is_meta
    assert isinstance(moved["ordered"], OrderedDict)
    assert moved["default"]["y"] == []
    assert moved["item"].x.is_meta
    assert (moved["item"].label, moved["none"], moved["class"]) == ("cat", None, MovesInPlace)
    assert moved["own"] is own
    assert own.device == "meta"
    assert not batch["item"].x.is_meta  # type: ignore[attr-defined]  # its type does not say so
