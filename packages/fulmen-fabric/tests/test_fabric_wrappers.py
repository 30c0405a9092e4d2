"""Wrapped modules, optimizers, callbacks and loggers as their users see them."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from fulmen_fabric import Fabric, is_wrapped
from fulmen_protocols import NotConforming


class Net(nn.Module):
    kind = "net"

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(()))
        self.scale = 2.0

    def forward(self, x):
        return self.layer(x) * self.scale

    def training_step(self, batch):
        return self(batch).sum()

    def helper(self, x):
        return self.layer(x)

    @property
    def width(self):
        return self.layer.in_features


@pytest.fixture
def fabric():
    return Fabric(accelerator="cpu", devices=1)


@pytest.fixture
def model(fabric):
    return fabric.setup(Net())


@pytest.mark.proves("8.18")
def test_state_has_the_modules_own_names(model):
    names = ["count", "layer.weight", "layer.bias"]
    assert list(model.state_dict()) == names
    assert list(model.state_dict(prefix="p.")) == [f"p.{name}" for name in names]
    assert [name for name, _ in model.named_parameters()] == names[1:]
    assert [name for name, _ in model.named_modules()] == ["", "layer"]
    assert [name for name, _ in model.named_buffers()] == ["count"]
    Net().load_state_dict(model.state_dict())
    model.load_state_dict(Net().state_dict())


@pytest.mark.proves("8.18")
def test_attributes_are_read_from_and_written_to_the_module(model):
    assert model.scale == 2.0
    assert model.kind == "net"
    assert model.width == 2
    model.scale = 3.0
    model.fresh = "new"
    assert model.module.scale == 3.0
    assert model.module.fresh == "new"
    del model.fresh
    assert not hasattr(model.module, "fresh")
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing


@pytest.mark.proves("8.18")
def test_device_and_dtype_are_known_as_of_a_lightning_module(fabric):
    model = Fabric(accelerator="cpu", devices=1, precision="bf16-true").setup(Net())
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.bfloat16)

    class Own(Net):
        device = "its own"

    assert fabric.setup(Own()).device == "its own"
    with pytest.raises(AttributeError, match="device"):
        _ = fabric.setup(nn.Identity()).device


def test_a_submodule_set_later_is_seen_on_both_sides(model):
    model.extra = nn.Linear(1, 1)
    assert "extra.weight" in dict(model.module.named_parameters())
    assert "extra.weight" in dict(model.named_parameters())


def test_training_mode_reaches_the_module(model):
    model.eval()
    assert not model.training
    assert not model.module.training
    assert not model.layer.training
    model.train()
    assert model.training
    assert model.module.training
    assert model.layer.training


def test_step_methods_and_helpers_work_as_before(model):
    x = torch.ones(1, 2)
    assert torch.equal(model.training_step(x), model(x).sum())
    assert torch.equal(model.helper(x), model.layer(x))


@pytest.mark.proves("8.18")
def test_methods_marked_or_known_run_in_the_precision():
    model = Fabric(accelerator="cpu", devices=1, precision="64-true").setup(Net())
    with pytest.raises(RuntimeError):
        model.helper(torch.ones(1, 2))  # a plain call meets float64 weights
    model.mark_forward_method("helper")
    assert model.helper(torch.ones(1, 2)).dtype == torch.float32
    assert model.training_step(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.proves("8.18")
@pytest.mark.parametrize("name", ["training_step", "validation_step", "test_step", "predict_step"])
def test_every_step_method_runs_in_the_precision_without_being_marked(name):
    class Steps(Net):
        pass

    setattr(Steps, name, lambda self, batch: self.layer(batch))
    model = Fabric(accelerator="cpu", devices=1, precision="64-true").setup(Steps())
    assert getattr(model, name)(torch.ones(1, 2)).dtype == torch.float32
    assert torch.equal(getattr(model, name)(torch.ones(1, 2)) * 2, model(torch.ones(1, 2)))


def test_only_methods_of_the_module_can_be_marked(model):
    with pytest.raises(AttributeError, match="no method 'scale'"):
        model.mark_forward_method("scale")
    with pytest.raises(ValueError, match="already"):
        model.mark_forward_method("forward")
    model.mark_forward_method(model.module.helper)


def test_hooks_on_the_wrapper_and_on_the_module_run(model):
    seen = []
    model.register_forward_hook(lambda *_: seen.append("wrapper"))
    model.module.register_forward_hook(lambda *_: seen.append("module"))
    model(torch.ones(1, 2))
    assert seen == ["module", "wrapper"]


def test_a_wrapped_module_can_be_part_of_another(model):
    outer = nn.Sequential(model)
    assert list(outer.state_dict()) == ["0.count", "0.layer.weight", "0.layer.bias"]
    outer.load_state_dict(outer.state_dict())
    assert len(list(outer.parameters())) == 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_deep_copy_is_independent(precision):
    model = Fabric(accelerator="cpu", devices=1, precision=precision).setup(Net())
    model.mark_forward_method("helper")
    copied = copy.deepcopy(model)
    x = torch.ones(1, 2)
    before = model(x)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(model(x), before)
    assert not copied(x).any()
    assert not copied.helper(x).any()
    assert model.helper(x).any()


def test_a_dropped_module_is_freed(fabric):
    model = fabric.setup(Net())
    ref = weakref.ref(model.module)
    del model
    gc.collect()
    assert ref() is None


@pytest.mark.proves("8.19")
def test_the_optimizer_is_of_its_own_class_and_shares_everything(fabric):
    net = Net()
    raw = torch.optim.Adam(net.parameters(), lr=0.1)
    _, opt = fabric.setup(net, raw)
    assert isinstance(opt, torch.optim.Adam)
    assert opt.optimizer is raw
    assert opt.param_groups is raw.param_groups
    assert opt.defaults is raw.defaults
    net(torch.ones(1, 2)).sum().backward()
    opt.step()
    assert opt.state is raw.state
    assert len(opt.state) == 2
    other = torch.optim.Adam(Net().parameters(), lr=0.7)
    opt.load_state_dict(other.state_dict())
    assert opt.param_groups is raw.param_groups
    assert opt.param_groups[0]["lr"] == raw.param_groups[0]["lr"] == 0.7
    assert opt.state_dict() == raw.state_dict()
    opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(raw.param_groups) == 2
    opt.zero_grad()
    assert all(parameter.grad is None for parameter in net.parameters())
    assert "FabricAdam" in repr(opt)


@pytest.mark.proves("8.19")
def test_step_hooks_run_once_wherever_they_are_registered(fabric):
    net = Net()
    raw = torch.optim.SGD(net.parameters(), lr=0.1)
    calls = []
    raw.register_step_pre_hook(lambda *_: calls.append("before setup"))
    _, opt = fabric.setup(net, raw)
    opt.register_step_post_hook(lambda *_: calls.append("after setup"))
    net(torch.ones(1, 2)).sum().backward()
    opt.step()
    assert calls == ["before setup", "after setup"]


@pytest.mark.proves("8.17")
def test_wrapped_things_are_known(fabric, model):
    opt = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1))
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader([1]))
    assert all(map(is_wrapped, (model, opt, loader)))
    assert not any(map(is_wrapped, (model.module, opt.optimizer, [1])))


@pytest.mark.proves("8.6")
def test_move_to_device_false_leaves_a_module_where_it_is(fabric):
    net = nn.Linear(1, 1, device="meta")
    assert fabric.setup(net, move_to_device=False).weight.is_meta


@pytest.mark.proves("8.6")
def test_a_module_on_several_devices_is_named(fabric):
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(1, 1)
            self.b = nn.Linear(1, 1, device="meta")

        def to(self, *args, **kwargs):
            return self

    with pytest.warns(UserWarning, match="parameters on cpu, meta"):
        fabric.setup(Split())


class Recorder:
    def __init__(self):
        self.calls = []

    def on_after_setup(self, fabric, module):
        self.calls.append(("setup", is_wrapped(module)))

    def on_after_optimizer_step(self, strategy, optimizer):
        self.calls.append(("step", type(optimizer).__name__))

    def on_epoch(self, number, *, loss):
        self.calls.append(("epoch", number, loss))

    broken = "not a method"


@pytest.mark.proves("8.15")
def test_callbacks_hear_of_setup_steps_and_calls():
    recorder = Recorder()
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[recorder, object()])
    _, opt = fabric.setup(Net(), torch.optim.SGD(Net().parameters(), lr=0.1))
    opt.step()
    fabric.call("on_epoch", 3, loss=0.5, unknown=1)
    fabric.call("nobody_has_this")
    assert recorder.calls == [("setup", True), ("step", "SGD"), ("epoch", 3, 0.5)]
    with pytest.warns(UserWarning, match="broken is not a method"):
        fabric.call("broken")


class Lit(Net):
    """What a LightningModule has for a Fabric."""

    _fabric = None
    ended = 0

    @property
    def fabric(self):
        return self._fabric

    @fabric.setter
    def fabric(self, value):
        self._fabric = value

    def on_train_epoch_end(self):
        self.ended += 1


@pytest.mark.proves("8.20")
def test_such_a_module_knows_its_optimizers_also_when_they_are_made_after_it(fabric):
    together, apart = Lit(), Lit()
    _, first = fabric.setup(together, torch.optim.SGD(together.parameters(), lr=1))
    model = fabric.setup_module(apart)
    second = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1))
    third = fabric.setup_optimizers(torch.optim.Adam(model.parameters(), lr=1))
    assert together._fabric_optimizers == [first]
    assert apart._fabric_optimizers == [second, third]


@pytest.mark.proves("8.20")
def test_a_module_that_knows_fabric_learns_whose_loop_runs_it_and_becomes_a_callback():
    fabric = Fabric(accelerator="cpu", devices=1)
    module = Lit()
    fabric.setup(module)
    assert module.fabric is fabric
    fabric.call("on_train_epoch_end")
    assert module.ended == 1


class Memory:
    name, version = "memory", 0

    def __init__(self):
        self.seen = []

    def log_metrics(self, metrics, step=None):
        self.seen.append((metrics, step))

    def log_hyperparams(self, params):
        pass

    def save(self):
        pass

    def finalize(self, status):
        pass


@pytest.mark.proves("8.16")
def test_metrics_reach_every_logger_as_numbers():
    loggers = [Memory(), Memory()]
    fabric = Fabric(accelerator="cpu", devices=1, loggers=loggers)
    fabric.log("a", torch.tensor(1.5), step=3)
    fabric.log_dict({"b": 2, "c": torch.tensor([4])})
    for logger in loggers:
        assert logger.seen == [({"a": 1.5}, 3), ({"b": 2, "c": 4}, None)]
        assert isinstance(logger.seen[0][0]["a"], float)
    assert fabric.logger is loggers[0]
    with pytest.raises(ValueError, match=r"fabric.log got 'd': a tensor of shape \(2,\) is no scalar. Reduce it"):
        fabric.log_dict({"a": 1.0, "d": torch.ones(2)})


@pytest.mark.proves("8.3")
def test_without_a_logger_the_first_one_is_an_index_error(fabric):
    fabric.log("a", 1.0)
    with pytest.raises(IndexError, match="no logger"):
        _ = fabric.logger


def test_a_logger_that_cannot_log_is_refused():
    with pytest.raises(NotConforming, match="log_metrics"):
        Fabric(accelerator="cpu", devices=1, loggers=object())
