"""A loop of one's own through Fabric in one process, against the same loop in plain PyTorch, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fulmen_fabric import Fabric, is_wrapped
from fulmen_protocols import MisconfigurationException, MisconfigurationTypeError


def make(optimizer=torch.optim.SGD, **options):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    return module, optimizer(module.parameters(), **{"lr": 0.1, **options})


def batches(count=6, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 4, generator=generator) * scale for _ in range(count)]


def same(left, right):
    ours, raw = list(left.parameters()), list(right.parameters())
    assert len(ours) == len(raw) > 0
    return all(torch.equal(a, b) for a, b in zip(ours, raw, strict=True))


def cpu(**arguments):
    return Fabric(accelerator="cpu", devices=1, **arguments)


@pytest.mark.proves("3.18", "8.10")
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("clip", [None, "norm", "value"])
def test_a_loop_has_the_bits_of_plain_pytorch(optimizer, clip):
    raw, raw_optimizer = make(optimizer)
    for x in batches():
        raw_optimizer.zero_grad()
        raw(x).square().mean().backward()
        if clip == "norm":
            raw_norm = nn.utils.clip_grad_norm_(raw.parameters(), 0.01)
        elif clip == "value":
            nn.utils.clip_grad_value_(raw.parameters(), 0.001)
        raw_optimizer.step()

    fabric = cpu()
    model, opt = fabric.setup(*make(optimizer))
    for x in batches():
        opt.zero_grad()
        fabric.backward(model(x).square().mean())
        if clip == "norm":
            norm = fabric.clip_gradients(model, opt, max_norm=0.01)
            last = norm
        elif clip == "value":
            assert fabric.clip_gradients(model, opt, clip_val=0.001) is None
        opt.step()

    assert same(model, raw)
    if clip == "norm":
        assert torch.equal(last, raw_norm)


@pytest.mark.proves("8.12")
def test_accumulation_with_no_backward_sync_has_the_bits_of_plain_pytorch():
    raw, raw_optimizer = make()
    for number, x in enumerate(batches(), 1):
        (raw(x).sum() / 3).backward()
        if number % 3 == 0:
            raw_optimizer.step()
            raw_optimizer.zero_grad()
    fabric = cpu()
    model, opt = fabric.setup(*make())
    for number, x in enumerate(batches(), 1):
        with fabric.no_backward_sync(model, enabled=number % 3 != 0):
            fabric.backward(model(x).sum() / 3)
        if number % 3 == 0:
            opt.step()
            opt.zero_grad()
    assert same(model, raw)


@pytest.mark.parametrize("before", [True, False])
def test_a_scheduler_works_whether_made_before_or_after_setup(before):
    raw, raw_optimizer = make()
    raw_scheduler = torch.optim.lr_scheduler.ExponentialLR(raw_optimizer, 0.5)
    module, optimizer = make()
    fabric = cpu()
    if before:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    model, opt = fabric.setup(module, optimizer)
    if not before:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    for x in batches():
        for net, step_optimizer, step_scheduler in (
            (raw, raw_optimizer, raw_scheduler),
            (model, opt, scheduler),
        ):
            step_optimizer.zero_grad()
            net(x).sum().backward()
            step_optimizer.step()
            step_scheduler.step()  # with warnings as errors: it must have seen the optimizer's step
    assert same(model, raw)
    assert opt.param_groups[0]["lr"] == raw_optimizer.param_groups[0]["lr"]


@pytest.mark.proves("8.19")
def test_lbfgs_gets_its_closure_and_returns_its_loss():
    def train(model, opt, backward):
        for x in batches(2):

            def closure(x=x):
                opt.zero_grad()
                loss = model(x).square().mean()
                backward(loss)
                return loss

            result = opt.step(closure)
        return result

    raw, raw_optimizer = make(torch.optim.LBFGS)
    raw_loss = train(raw, raw_optimizer, torch.Tensor.backward)
    fabric = cpu()
    model, opt = fabric.setup(*make(torch.optim.LBFGS))
    loss = train(model, opt, fabric.backward)
    assert same(model, raw)
    assert torch.equal(loss, raw_loss)


def test_double_precision_equals_a_double_model_in_plain_pytorch():
    raw, raw_optimizer = make()
    raw.double()
    for x in batches():
        raw_optimizer.zero_grad()
        raw(x.double()).sum().backward()
        raw_optimizer.step()
    fabric = cpu(precision="64-true")
    model, opt = fabric.setup(*make())
    for x in batches():
        opt.zero_grad()
        output = model(x)
        assert output.dtype == torch.get_default_dtype()
        fabric.backward(output.sum())
        opt.step()
    assert next(model.parameters()).dtype == torch.float64
    for ours, theirs in zip(model.parameters(), raw.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6)  # our loss is summed in the default dtype


def test_bf16_mixed_equals_autocast_in_plain_pytorch():
    raw, raw_optimizer = make()
    for x in batches():
        raw_optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = raw(x)
        output.float().sum().backward()
        raw_optimizer.step()
    fabric = cpu(precision="bf16-mixed")
    model, opt = fabric.setup(*make())
    for x in batches():
        opt.zero_grad()
        output = model(x)
        assert output.dtype == torch.float32
        fabric.backward(output.sum())
        opt.step()
    assert same(model, raw)


@pytest.mark.proves("3.18", "8.10", "8.19")
def test_16_mixed_equals_autocast_and_a_grad_scaler_in_plain_pytorch():
    raw, raw_optimizer = make()
    scaler = torch.amp.GradScaler("cpu")
    for x in batches(scale=50):
        raw_optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            output = raw(x)
        scaler.scale(output.float().square().sum()).backward()
        scaler.unscale_(raw_optimizer)
        nn.utils.clip_grad_norm_(raw.parameters(), 1.0)
        scaler.step(raw_optimizer)
        scaler.update()
    fabric = cpu(precision="16-mixed")
    model, opt = fabric.setup(*make())
    for x in batches(scale=50):
        opt.zero_grad()
        fabric.backward(model(x).square().sum())
        fabric.clip_gradients(model, opt, max_norm=1.0, error_if_nonfinite=False)
        opt.step()
    assert same(model, raw)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.proves("8.9")
def test_where_the_loss_must_be_scaled_plain_backward_is_refused():
    fabric = cpu(precision="16-mixed")
    model, _ = fabric.setup(*make())
    with pytest.raises(RuntimeError, match=r"Call fabric\.backward"):
        model(batches(1)[0]).sum().backward()
    fabric.backward(model(batches(1)[0]).sum())


@pytest.mark.proves("8.19")
def test_a_closure_with_a_scaler_is_refused():
    fabric = cpu(precision="16-mixed")
    _, opt = fabric.setup(*make())
    with pytest.raises(MisconfigurationException, match="closure"):
        opt.step(lambda: None)


@pytest.mark.proves("8.11")
def test_autocast_computes_outside_the_module_in_the_same_precision():
    with cpu(precision="bf16-mixed").autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with cpu().autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.proves("3.19", "8.13")
def test_tensors_and_modules_are_created_in_the_precision():
    fabric = cpu(precision="bf16-true")
    with fabric.init_tensor():
        assert torch.ones(1).dtype == torch.bfloat16
    with fabric.init_module():
        assert nn.Linear(2, 2).weight.dtype == torch.bfloat16
    assert torch.ones(1).dtype == torch.float32


@pytest.mark.proves("3.19", "8.13")
def test_an_empty_module_draws_no_random_numbers():
    fabric = cpu()
    before = torch.get_rng_state()
    with fabric.init_module(empty_init=True):
        module = nn.Linear(50, 50)
    assert torch.equal(torch.get_rng_state(), before)
    assert module.weight.shape == (50, 50)


@pytest.mark.proves("8.6")
def test_setup_returns_what_it_was_given_in_that_order():
    fabric = cpu()
    module, optimizer = make()
    second = torch.optim.Adam(module.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    model, first, other, same_scheduler = fabric.setup(module, optimizer, second, scheduler=scheduler)
    assert isinstance(first, torch.optim.SGD)
    assert isinstance(other, torch.optim.Adam)
    assert same_scheduler is scheduler
    assert model.module is module
    assert is_wrapped(fabric.setup(make()[0]))


@pytest.mark.proves("8.7")
def test_the_optimizer_may_be_made_after_the_module_is_placed():
    raw, raw_optimizer = make()
    fabric = cpu()
    model = fabric.setup_module(make()[0])
    opt = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    for x in batches():
        for net, one in ((raw, raw_optimizer), (model, opt)):
            one.zero_grad()
            net(x).sum().backward()
            one.step()
    assert same(model, raw)
    two = fabric.setup_optimizers(*(torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2)))
    assert len(two) == 2


@pytest.mark.proves("8.6")
def test_a_compiled_module_is_compiled_again_around_what_the_strategy_placed():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    raw, _ = make()
    fabric = cpu()
    model = fabric.setup(torch.compile(make()[0], backend=backend))
    x = batches(1)[0]
    assert torch.equal(model(x), raw(x))
    assert compiled
    assert list(model.state_dict()) == list(raw.state_dict())
    compiled.clear()
    inside = fabric.setup(torch.compile(make()[0], backend=backend), _reapply_compile=False)
    assert torch.equal(inside(x), raw(x))
    assert compiled
    assert list(inside.state_dict()) == list(raw.state_dict())


@pytest.mark.proves("8.4", "8.6")
@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda f, m, o: f.setup(f.setup(m)), "setup got a Sequential that has been set up before"),
        (
            lambda f, m, o: f.setup_module(torch.compile(f.setup(m), backend="eager")),
            "setup_module got a Sequential that has been set up before",
        ),
        (lambda f, m, o: f.setup(m, f.setup_optimizers(o)), "setup got a SGD that has been set up before"),
        (lambda f, m, o: f.setup_optimizers(m), "setup_optimizers got a Sequential for an optimizer"),
        (lambda f, m, o: f.setup(m, o, torch.optim.lr_scheduler.StepLR(o, 1)), "StepLR.*scheduler goes to scheduler="),
        (lambda f, m, o: f.setup_optimizers(), "no optimizer"),
        (lambda f, m, o: f.setup(o), "setup got SGD for the module"),
        (lambda f, m, o: f.setup(m, m), "setup got a Sequential for an optimizer"),
        (lambda f, m, o: f.setup_dataloaders(), "no loader"),
        (lambda f, m, o: f.setup_dataloaders([1, 2]), "got list"),
        (lambda f, m, o: f.clip_gradients(m, o), "exactly one"),
        (lambda f, m, o: f.clip_gradients(m, o, clip_val=1.0, max_norm=1.0), "exactly one"),
        (lambda f, m, o: f.no_backward_sync(m), "Pass the module that setup"),
        (lambda f, m, o: f.launch(3), "cannot be called"),
        (lambda f, m, o: f.launch(lambda: None), "takes no argument"),
        (lambda f, m, o: f.all_reduce(1, reduce_op="median"), "reduce_op='median'"),
        (lambda f, m, o: f.all_gather(1, group="some"), "group='some'"),
        (
            lambda f, m, o: f.setup_optimizers(torch.optim.SGD(nn.Linear(1, 1, device="meta").parameters(), lr=1)),
            "meta device",
        ),
    ],
)
def test_misuse_has_one_clear_error(act, says):
    with pytest.raises(MisconfigurationException, match=says):
        act(cpu(), *make())


def test_wrong_types_are_type_errors_too():
    with pytest.raises(MisconfigurationTypeError):
        cpu().setup("model")


@pytest.mark.proves("8.5")
def test_several_devices_must_be_launched_first():
    fabric = Fabric(accelerator="cpu", devices=2)
    module, optimizer = make()
    for act in (
        lambda: fabric.setup(module, optimizer),
        lambda: fabric.setup_module(module),
        lambda: fabric.setup_optimizers(optimizer),
        lambda: fabric.barrier(),
        lambda: fabric.broadcast(1),
        lambda: fabric.all_gather(1),
        lambda: fabric.save("x.ckpt", {}),
    ):
        with pytest.raises(RuntimeError, match=r"2 processes .* Call fabric\.launch\(\) first"):
            act()


@pytest.mark.proves("4.7", "4.16", "8.11")
def test_one_process_gathers_and_reduces_what_it_has():
    fabric = cpu()
    data = {"a": torch.ones(2), "b": [1.5, "text"]}
    gathered = fabric.all_gather(data)
    assert gathered["a"].shape == (2,)
    assert gathered["b"][0].item() == 1.5
    assert gathered["b"][1] == "text"
    assert fabric.all_reduce(3, reduce_op="sum").item() == 3
    assert fabric.broadcast(data) is data
    fabric.barrier()
    with fabric.rank_zero_first():
        pass


@pytest.mark.proves("8.4")
def test_launch_passes_the_fabric_and_returns_the_value():
    fabric = cpu()
    assert fabric.launch(lambda f, x, y: (f is fabric, x + y), 1, y=2) == (True, 3)
    assert fabric.launch() is None


@pytest.mark.proves("8.17")
def test_a_subclass_may_hold_the_loop_in_run():
    class Mine(Fabric):
        def run(self, start):
            return start + self.world_size + self.global_rank

    assert Mine(accelerator="cpu", devices=1).run(5) == 6
    with pytest.raises(NotImplementedError):
        cpu().run()


@pytest.mark.proves("8.2")
def test_environment_variables_override_arguments(monkeypatch):
    monkeypatch.setenv("LT_PRECISION", "64-true")
    monkeypatch.setenv("LT_DEVICES", "1")
    monkeypatch.setenv("LT_ACCELERATOR", "cpu")
    fabric = Fabric(accelerator="cuda", devices=7, precision="bf16-mixed")
    assert next(fabric.setup(nn.Linear(1, 1)).parameters()).dtype == torch.float64
    monkeypatch.setenv("LT_NUM_NODES", "some")
    with pytest.raises(MisconfigurationException, match="LT_NUM_NODES='some'"):
        Fabric()


def test_print_prints(capsys):
    cpu().print("hello", end="!")
    assert capsys.readouterr().out == "hello!"


@pytest.mark.proves("8.11")
def test_data_and_modules_go_to_the_device():
    fabric = cpu()
    module = nn.Linear(1, 1)
    assert fabric.to_device(module) is module
    assert fabric.to_device([torch.ones(1)])[0].device == fabric.device


def test_a_run_can_be_closed_and_started_again():
    fabric = cpu()
    fabric.setup(nn.Linear(1, 1))
    fabric.close()
    fabric.close()
    assert fabric.setup(nn.Linear(1, 1))(torch.ones(1)).shape == (1,)


def test_ddp_with_one_process_has_the_bits_of_plain_pytorch_and_leaves_its_group():
    raw, raw_optimizer = make()
    for _ in range(2):
        fabric = cpu(strategy="ddp")
        model, opt = fabric.setup(*make())
        for x in batches():
            opt.zero_grad()
            fabric.backward(model(x).sum())
            opt.step()
        assert torch.distributed.is_initialized()
        del model, opt
        fabric.close()
        assert not torch.distributed.is_initialized()
    fabric = cpu(strategy="ddp")
    model, opt = fabric.setup(*make())
    for x in batches():
        for net, one in ((raw, raw_optimizer), (model, opt)):
            one.zero_grad()
            net(x).sum().backward()
            one.step()
    assert same(model, raw)
    assert fabric.all_gather(torch.ones(2)).shape == (2,)
    del model, opt
    fabric.close()


@pytest.mark.proves("3.3", "8.9", "8.19")
def test_a_strategy_whose_engine_owns_backward_and_step_is_asked_for_both():
    class Engine:
        """A vendor's engine, without any base class of ours."""

        root_device = torch.device("cpu")

        def __init__(self):
            self.calls = []

        def setup_environment(self, topology):
            pass

        def module_context(self, *, empty):
            raise NotImplementedError

        def place(self, module):
            self.module = module
            return module

        def prepare_optimizers(self, module, optimizers):
            return optimizers

        def teardown(self):
            pass

        def backward(self, loss, module, **kwargs):
            self.calls.append(("backward", module is self.module, kwargs))
            loss.backward()

        def optimizer_step(self, optimizer, module, closure=None):
            self.calls.append(("step", module is self.module))
            return optimizer.step()

        def clip_grad_norm(self, module, optimizer, max_norm, *, norm_type=2.0, error_if_nonfinite=False):
            self.calls.append(("clip", module is self.module, max_norm))
            return torch.tensor(0.0)

        def clip_grad_value(self, module, optimizer, clip_value):
            self.calls.append(("clip value", clip_value))

        def apply_precision_plan(self, plan):
            self.compute = plan["compute"]

    engine = Engine()
    fabric = cpu(strategy=engine, precision="bf16-mixed")
    model, opt = fabric.setup(*make())
    loss = model(batches(1)[0]).sum()
    with pytest.raises(RuntimeError, match=r"Call fabric\.backward"):
        loss.backward(retain_graph=True)
    fabric.backward(loss, model=model, again=True)
    fabric.clip_gradients(model, opt, max_norm=1.0)
    fabric.clip_gradients(model, opt, clip_val=0.5)
    opt.step()
    assert engine.compute == torch.bfloat16
    assert engine.calls == [
        ("backward", True, {"again": True}),
        ("clip", True, 1.0),
        ("clip value", 0.5),
        ("step", True),
    ]
    with pytest.raises(MisconfigurationException, match="takes no positional"):
        fabric.backward(loss, torch.ones(()))
