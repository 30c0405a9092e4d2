"""The public face of a Fabric: its arguments, what they may not say, and what engines and vendors see of it."""

from __future__ import annotations

import dataclasses
import inspect
import os

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fulmen_fabric import Fabric, LightningDeprecationWarning, assemble
from fulmen_fabric._setup import Composer
from fulmen_protocols import MisconfigurationException, MisconfigurationRuntimeError


def cpu(**arguments):
    return Fabric(accelerator="cpu", devices=1, **arguments)


@pytest.mark.proves("8.1")
def test_every_argument_has_lightnings_name_and_default_and_is_given_by_name():
    parameters = inspect.signature(Fabric).parameters
    assert {name: one.default for name, one in parameters.items()} == {
        "accelerator": "auto",
        "strategy": "auto",
        "devices": "auto",
        "num_nodes": 1,
        "precision": None,
        "plugins": None,
        "callbacks": None,
        "loggers": None,
    }
    assert all(one.kind is one.KEYWORD_ONLY for one in parameters.values())
    with pytest.raises(TypeError):
        Fabric("cpu")


@pytest.mark.proves("8.2")
@pytest.mark.parametrize(
    ("variable", "found", "given"),
    [
        ("LT_PRECISION", "64-true", {"precision": "bf16-mixed"}),
        ("LT_DEVICES", "1", {"devices": 2}),
        ("LT_ACCELERATOR", "cpu", {"accelerator": "cuda"}),
        ("LT_STRATEGY", "ddp", {"strategy": "single_device"}),
        ("LT_NUM_NODES", "1", {"num_nodes": 2}),
    ],
)
def test_code_may_not_contradict_the_command_line(monkeypatch, variable, found, given):
    monkeypatch.setenv("LT_CLI_USED", "1")
    monkeypatch.setenv(variable, found)
    [(name, value)] = given.items()
    says = (
        rf"Fabric\({name}={value!r}\) in the code contradicts {variable}='{found}'.*Remove {name}= from the code, or --"
    )
    with pytest.raises(MisconfigurationException, match=says):
        Fabric(**given)
    monkeypatch.setenv("LT_CLI_USED", "0")
    monkeypatch.setenv("LT_ACCELERATOR", "cpu")
    monkeypatch.setenv("LT_DEVICES", "1")
    monkeypatch.setenv("LT_NUM_NODES", "1")
    assert Fabric(**given).world_size == 1  # without a command line the variables win


@pytest.mark.proves("8.2")
def test_under_a_command_line_what_agrees_or_says_nothing_is_fine(monkeypatch):
    for name, value in {"CLI_USED": "1", "DEVICES": "1", "ACCELERATOR": "cpu", "PRECISION": "64-true"}.items():
        monkeypatch.setenv(f"LT_{name}", value)
    fabric = Fabric(devices=1, precision="64-true")
    assert fabric.precision.plan()["parameter"] == torch.float64
    assert fabric.launch(lambda one: one.world_size) == 1


@pytest.mark.proves("8.3")
def test_properties_say_where_the_process_stands():
    logger = object.__new__(type("Null", (), dict.fromkeys(("name", "version"), "x") | dict.fromkeys(
        ("log_metrics", "log_hyperparams", "save", "finalize"), lambda *_: None)))  # fmt: skip
    fabric = cpu(loggers=[logger])
    assert fabric.accelerator.name() == "cpu"
    assert type(fabric.strategy).__name__ == "SingleDeviceStrategy"
    assert fabric.device == torch.device("cpu")
    assert (fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.world_size) == (0, 0, 0, 1)
    assert fabric.is_global_zero
    assert fabric.loggers == [logger]
    assert fabric.logger is logger


class Engine:
    """A vendor's engines, one for each module, which own the backward pass; no base class of ours."""

    root_device = torch.device("cpu")

    def __init__(self):
        self.calls = []

    def setup_environment(self, topology):
        pass

    def module_context(self, *, empty):
        raise NotImplementedError

    def place(self, module):
        return module

    def prepare_optimizers(self, module, optimizers):
        self.calls.append(("prepare", module))
        return optimizers

    def teardown(self):
        pass

    def backward(self, loss, module, **kwargs):
        self.calls.append(("backward", module))
        loss.backward()


@pytest.mark.proves("8.9")
def test_with_several_engines_the_model_must_be_named():
    engine = Engine()
    fabric = cpu(strategy=engine)
    with pytest.raises(MisconfigurationRuntimeError, match=r"no module was set up. Call fabric.setup\(\) first"):
        fabric.backward(torch.ones((), requires_grad=True))
    first = fabric.setup(nn.Linear(1, 1))
    fabric.backward(first(torch.ones(1, 1)).sum())
    second = fabric.setup(nn.Bilinear(1, 1, 1))
    loss = second(torch.ones(1, 1), first(torch.ones(1, 1))).sum()
    with pytest.raises(
        MisconfigurationException, match=r"which of 2 modules \(.*\).*fabric.backward\(loss, model=model\)"
    ):
        fabric.backward(loss)
    fabric.backward(loss, model=second)
    ran = [module for what, module in engine.calls if what == "backward"]
    assert ran == [first.module, second.module]


@pytest.mark.proves("8.7")
def test_an_engine_is_given_optimizers_that_are_made_after_its_module():
    engine = Engine()
    fabric = cpu(strategy=engine)
    model = fabric.setup_module(nn.Linear(1, 1))
    other = fabric.setup_module(nn.Linear(1, 1))
    fabric.setup_optimizers(torch.optim.SGD(other.parameters(), lr=1))
    fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1))
    assert engine.calls == [("prepare", other.module), ("prepare", model.module)]


@pytest.mark.proves("8.12")
def test_a_strategy_that_cannot_hold_back_the_reduction_says_so():
    assembly = dataclasses.replace(assemble(accelerator="cpu", devices=2, strategy="ddp"), strategy=Engine())
    with (
        pytest.warns(
            UserWarning, match=r"'ddp' cannot hold back the reduction of gradients: no_backward_sync\(\) has no"
        ),
        Composer(assembly).no_sync(nn.Linear(1, 1)),
    ):
        pass
    fabric = cpu()
    with fabric.no_backward_sync(fabric.setup(nn.Linear(1, 1))):  # one device: nothing to hold back, nothing to say
        pass


@pytest.mark.proves("8.10")
def test_gradients_that_are_not_finite_are_an_error_unless_asked_otherwise():
    fabric = cpu()
    net = nn.Linear(1, 1)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=1))
    net.weight.grad = torch.full((1, 1), float("nan"))
    with pytest.raises(RuntimeError, match="non-finite"):
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    assert fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=False).isnan()
    net.weight.grad = torch.full((1, 1), 3.0)
    assert fabric.clip_gradients(model, optimizer, max_norm=1.0, norm_type=1).item() == 3.0


@pytest.mark.proves("8.13")
def test_sharded_model_is_an_old_name_of_init_module():
    fabric = cpu(precision="bf16-true")
    with pytest.warns(LightningDeprecationWarning, match=r"Use fabric\.init_module\(\)"):
        context = fabric.sharded_model()
    with context:
        assert nn.Linear(1, 1).weight.dtype == torch.bfloat16


@pytest.mark.proves("8.16")
def test_seeding_seeds_loader_workers_too_unless_asked_otherwise():
    assert Fabric.seed_everything(11) == 11
    first = torch.rand(1)
    assert os.environ["PL_SEED_WORKERS"] == "1"
    cpu().seed_everything(11, workers=False, verbose=False)
    assert os.environ["PL_SEED_WORKERS"] == "0"
    assert torch.equal(torch.rand(1), first)


@pytest.mark.proves("8.6", "14.6")
def test_a_compiled_module_keeps_the_options_it_was_compiled_with():
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            torch._dynamo.graph_break()
            return self.layer(x)

    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    fabric = cpu()
    model = fabric.setup(torch.compile(Breaks(), backend=backend, fullgraph=True))
    with pytest.raises(Exception, match="graph_break"):
        model(torch.ones(1, 2))
    plain = fabric.setup(torch.compile(Breaks(), backend=backend, fullgraph=True), _reapply_compile=False)
    plain(torch.ones(1, 2))
    assert not seen


@pytest.mark.proves("8.8")
def test_batches_are_moved_unless_asked_otherwise_and_iterable_data_are_left_alone():
    class Data(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([torch.ones(1), torch.zeros(1)])

    class Moved(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.to:
                moves.append(1)
            return super().__torch_function__(function, types, args, kwargs or {})

    moves = []
    fabric = cpu()
    stay = fabric.setup_dataloaders(
        DataLoader(Data(), batch_size=None, collate_fn=lambda x: x.as_subclass(Moved)), move_to_device=False
    )
    go = fabric.setup_dataloaders(DataLoader(Data(), batch_size=None, collate_fn=lambda x: x.as_subclass(Moved)))
    assert len(list(stay)) == 2
    assert not moves
    assert len(list(go)) == 2
    assert len(moves) == 2
