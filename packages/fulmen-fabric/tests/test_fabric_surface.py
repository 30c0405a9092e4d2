"""The public face of a Fabric: its arguments, what they may not say, and what engines and vendors see of it."""

from __future__ import annotations

import dataclasses
import inspect
import os

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from fulmen_fabric import Fabric, LightningDeprecationWarning, assemble, is_wrapped
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
    with pytest.raises(MisconfigurationException, match=r"num_nodes=2\.7 is not a whole number of at least 1"):
        cpu(num_nodes=2.7)


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


class MakesAnew(Engine):
    """Puts new parameters into the module, and the optimizers onto those, as XLA's and sharding strategies do."""

    def place(self, module):
        self.new = {}
        for part in module.modules():
            for name, old in list(part.named_parameters(recurse=False)):
                self.new[old] = nn.Parameter(old.detach().clone())
                setattr(part, name, self.new[old])
        return module

    def prepare_optimizers(self, module, optimizers):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [self.new.get(one, one) for one in group["params"]]
        return optimizers


@pytest.mark.proves("8.7")
@pytest.mark.parametrize("after", [False, True])
def test_parameters_that_the_strategy_made_anew_are_those_that_the_optimizer_updates(after):
    fabric = cpu(strategy=MakesAnew())
    net = nn.Linear(1, 1, bias=False)
    old = net.weight
    if after:
        model = fabric.setup_module(net)
        optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1))
    else:
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=1))
    before = net.weight.item()

    fabric.backward(model(torch.ones(1, 1)).sum())
    optimizer.step()

    assert net.weight is not old
    assert net.weight.item() == pytest.approx(before - 1)
    assert old.item() == pytest.approx(before)


class Sharded(Engine):
    """Holds half of each state on this rank, says so by another layout, and takes it back."""

    state_kind = "full"

    def module_state(self, module, *, full):
        return {"mine": module.state_dict(), "full": full}

    def load_module_state(self, module, state, *, strict):
        module.load_state_dict(state["mine"], strict=strict)

    def optimizer_state(self, module, optimizer, *, full):
        self.calls.append(("state of", module))
        return {"mine": optimizer.state_dict(), "full": full}

    def load_optimizer_state(self, module, optimizer, state):
        self.calls.append(("state for", module))
        optimizer.load_state_dict(state["mine"])


@pytest.mark.proves("8.19")
def test_the_state_of_an_optimizer_comes_from_the_strategy_and_goes_back_through_it():
    engine = Sharded()
    fabric = cpu(strategy=engine)
    net = nn.Linear(1, 1)
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.5))
    fabric.backward(model(torch.ones(1, 1)).sum())
    optimizer.step()

    state = optimizer.state_dict()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.load_state_dict(state)

    assert state["full"] is True
    assert state["mine"]["state"][0]["step"] == 1
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.5
    assert [call for call in engine.calls if call[0].startswith("state")] == [("state of", net), ("state for", net)]


@pytest.mark.proves("8.6", "8.14", "8.17")
def test_a_module_compiled_after_setup_is_known_and_its_checkpoint_has_the_names_of_the_plain_one(tmp_path):
    fabric = cpu()
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    net[0] = torch.compile(net[0], backend="eager")  # a part, too
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=1))
    compiled = torch.compile(model, backend="eager")

    with fabric.no_backward_sync(compiled):
        fabric.backward(compiled(torch.ones(1, 2)).sum(), model=compiled)
    fabric.clip_gradients(compiled, optimizer, max_norm=1.0)
    fabric.save(tmp_path / "all.ckpt", {"model": compiled})

    assert is_wrapped(compiled)
    names = ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert list(torch.load(tmp_path / "all.ckpt", weights_only=True)["model"]) == names
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    fabric.load(tmp_path / "all.ckpt", {"model": plain})
    assert torch.equal(plain(torch.ones(1, 2)), net(torch.ones(1, 2)))
    with torch.no_grad():
        plain[0].weight.fill_(0.25)
    fabric.save(tmp_path / "plain.ckpt", {"model": plain})
    fabric.load(tmp_path / "plain.ckpt", {"model": compiled})
    assert model.module[0].weight.eq(0.25).all()
    torch.save(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).state_dict(), tmp_path / "raw.pt")
    fabric.load_raw(tmp_path / "raw.pt", compiled)
    assert not model.module[0].weight.eq(0.25).any()


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
    inside = fabric.setup(torch.compile(Breaks(), backend=backend, fullgraph=True), _reapply_compile=False)
    with pytest.raises(Exception, match="graph_break"):
        inside(torch.ones(1, 2))
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
