import copy
import pickle

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from fulmen_precision import HalfPrecision, MixedPrecision, ScaledMixedPrecision, autocast_cache_is_safe
from fulmen_protocols import (
    PRECISIONS,
    SupportsForwardContext,
    SupportsGradScaling,
    SupportsInputConversion,
    SupportsOutputConversion,
    load,
)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    shared = nn.Linear(16, 16)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), shared, nn.GELU(), shared, nn.Linear(16, 3))


def batches(count: int = 10) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(5, 6, generator=generator), torch.randn(5, 3, generator=generator)) for _ in range(count)]


def make_optimizer(kind: str, net: nn.Module) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.Adam(net.parameters(), lr=1e-2, fused=kind == "fused adam")


def assert_equal_weights(ours: nn.Module, theirs: nn.Module) -> None:
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(got, expected), "not one bit may differ"


@pytest.mark.proves("3.5")
@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_bf16_mixed_training_equals_a_raw_autocast_loop_bit_for_bit(kind) -> None:
    precision = MixedPrecision("bf16-mixed", "cpu", cache_casts=True)
    ours, theirs = make_net(), make_net()

    optimizer = make_optimizer(kind, ours)
    for x, y in batches():
        optimizer.zero_grad()
        with precision.forward_context():
            loss = nn.functional.mse_loss(ours(x), y)
        loss.backward()
        optimizer.step()

    optimizer = make_optimizer(kind, theirs)
    for x, y in batches():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.mse_loss(theirs(x), y)
        loss.backward()
        optimizer.step()

    assert_equal_weights(ours, theirs)


@pytest.mark.proves("3.4")
@pytest.mark.parametrize("kind", ["sgd", "adam", "fused adam"])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_16_mixed_training_on_the_cpu_equals_a_raw_scaler_loop_bit_for_bit(kind, clip) -> None:
    # From 2**22 the first gradients overflow float16: skipped steps, backoff and growth are part of the run.
    def make_scaler() -> GradScaler:
        return GradScaler("cpu", init_scale=2.0**22, growth_interval=4)

    precision = ScaledMixedPrecision("16-mixed", "cpu", make_scaler(), cache_casts=True)
    ours, theirs = make_net(), make_net()
    skipped = 0

    optimizer = make_optimizer(kind, ours)
    for x, y in batches(16):
        optimizer.zero_grad()
        with precision.forward_context():
            output = ours(x)
            loss = nn.functional.mse_loss(output, y)
        assert output.dtype == torch.float16, "no silent bfloat16"
        precision.scale(loss).backward()
        if clip is not None:
            precision.unscale(optimizer)
            torch.nn.utils.clip_grad_norm_(ours.parameters(), clip)
        before = precision.scaler.get_scale()
        precision.step(optimizer)
        precision.update()
        skipped += precision.scaler.get_scale() < before

    scaler = make_scaler()
    optimizer = make_optimizer(kind, theirs)
    for x, y in batches(16):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = nn.functional.mse_loss(theirs(x), y)
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()

    assert skipped >= 1, "the run must contain skipped steps to prove anything"
    assert_equal_weights(ours, theirs)
    assert precision.state_dict() == scaler.state_dict()


@pytest.mark.proves("3.5")
def test_only_16_mixed_offers_scaling_and_none_casts_inputs() -> None:
    scaled, plain = MixedPrecision("16-mixed", "cpu"), MixedPrecision("bf16-mixed", "cpu")
    assert isinstance(scaled, SupportsGradScaling)
    assert not isinstance(plain, SupportsGradScaling)
    for precision in (scaled, plain):
        assert isinstance(precision, SupportsForwardContext)
        assert isinstance(precision, SupportsOutputConversion)
        assert not isinstance(precision, SupportsInputConversion)
    assert scaled.plan()["scaler"] == "dynamic"
    assert plain.plan()["scaler"] == "none"
    assert scaled.plan()["compute"] == torch.float16
    assert plain.plan()["compute"] == torch.bfloat16
    assert plain.plan()["parameter"] == plain.plan()["reduction"] == plain.plan()["output"] == torch.float32


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_casting_the_inputs_first_would_change_nothing_that_enters_a_matrix_product(precision) -> None:
    mixed = MixedPrecision(precision, "cpu")
    linear, x = nn.Linear(6, 4), torch.randn(5, 6)
    with mixed.forward_context():
        assert torch.equal(linear(x), linear(x.to(mixed.plan()["compute"])))


@pytest.mark.proves("3.9")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("cache_casts", [False, None])
@pytest.mark.parametrize("own_context", [False, True])
def test_a_forward_without_gradients_inside_a_step_leaves_the_later_gradients_whole(
    precision, cache_casts, own_context
) -> None:
    mixed = MixedPrecision(precision, "cpu", cache_casts=cache_casts)
    net = nn.Linear(6, 3)
    x = torch.randn(4, 6)

    with mixed.forward_context():
        with torch.no_grad():
            if own_context:
                with mixed.forward_context():
                    net(x)
            else:
                net(x)
        loss = net(x).sum()
    loss.backward()

    assert net.weight.grad is not None
    assert torch.count_nonzero(net.weight.grad) > 0


def test_the_probe_of_the_cast_cache_tells_the_truth_and_draws_no_random_number() -> None:
    autocast_cache_is_safe.cache_clear()
    state = torch.get_rng_state()
    safe = autocast_cache_is_safe()
    assert torch.equal(state, torch.get_rng_state())

    net, x = nn.Linear(6, 3), torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            net(x)
        loss = net(x).sum()
    loss.backward()
    assert safe == (net.weight.grad is not None)


def test_unscale_divides_once_however_often_it_is_called() -> None:
    precision = ScaledMixedPrecision(scaler=GradScaler("cpu", init_scale=1024.0))
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)

    precision.scale((3.0 * weight).sum()).backward()
    assert weight.grad.item() == 3.0 * 1024
    precision.unscale(optimizer)
    precision.unscale(optimizer)
    assert weight.grad.item() == 3.0
    precision.step(optimizer)
    precision.update()
    assert weight.item() == -1.0

    optimizer.zero_grad()
    precision.scale((3.0 * weight).sum()).backward()
    precision.unscale(optimizer)
    assert weight.grad.item() == 3.0, "the next update is unscaled again"


def test_two_optimizers_share_one_scale_and_a_bad_gradient_skips_only_its_own() -> None:
    precision = ScaledMixedPrecision(scaler=GradScaler("cpu", init_scale=8.0))
    good, bad = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizers = [torch.optim.SGD([good], lr=1.0), torch.optim.SGD([bad], lr=1.0)]

    precision.scale(good.sum()).backward()
    precision.scale((bad * float("inf")).sum()).backward()
    for optimizer in optimizers:
        precision.unscale(optimizer)
        precision.step(optimizer)
    precision.update()

    assert good.item() == 0.0
    assert bad.item() == 1.0
    assert precision.scaler.get_scale() == 4.0


def test_lbfgs_is_refused_with_16_mixed() -> None:
    precision = MixedPrecision("16-mixed", "cpu")
    optimizer = torch.optim.LBFGS([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="LBFGS"):
        precision.unscale(optimizer)
    with pytest.raises(ValueError, match="LBFGS"):
        precision.step(optimizer)


def test_stepping_without_any_gradient_says_what_is_missing() -> None:
    precision = MixedPrecision("16-mixed", "cpu")
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    precision.scale(torch.ones(1, requires_grad=True)).backward()
    with pytest.raises(RuntimeError, match="none of its parameters has a gradient"):
        precision.step(optimizer)
    with pytest.raises(RuntimeError, match="no optimizer has stepped"):
        precision.update()


@pytest.mark.proves("3.5")
def test_the_scale_survives_a_checkpoint() -> None:
    first = ScaledMixedPrecision(scaler=GradScaler("cpu", init_scale=64.0, growth_interval=1))
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    first.scale(weight.sum()).backward()
    first.step(optimizer)
    first.update()

    second = MixedPrecision("16-mixed", "cpu")
    second.load_state_dict(first.state_dict())

    assert second.state_dict() == first.state_dict()
    assert second.scaler.get_scale() == 128.0
    assert all(type(value) in (int, float) for value in first.state_dict().values()), "plain data"
    with pytest.raises(ValueError, match="without a gradient scaler"):
        second.load_state_dict({})


def test_outputs_come_back_in_full_precision() -> None:
    precision = MixedPrecision("bf16-mixed", "cpu")
    output = {"logits": torch.ones(2, dtype=torch.bfloat16), "ids": torch.tensor([1])}
    assert precision.convert_output(output)["logits"].dtype == torch.float32
    assert precision.convert_output(output)["ids"] is output["ids"]


def test_the_module_keeps_float32_and_new_modules_get_it() -> None:
    precision = MixedPrecision("bf16-mixed", "cpu")
    module = nn.Linear(1, 1)
    assert precision.convert_module(module) is module
    with HalfPrecision("bf16-true").init_context(), precision.init_context():
        assert nn.Linear(1, 1).weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["16-mixed", "bf16-mixed"])
def test_each_mixed_precision_is_found_by_name_for_a_device_and_can_be_copied(name) -> None:
    precision = load(PRECISIONS, name, device="cpu")
    assert precision.precision == name
    for twin in (copy.deepcopy(precision), pickle.loads(pickle.dumps(precision))):
        assert type(twin) is type(precision)
        assert twin.plan() == precision.plan()


def test_the_device_may_carry_an_index_and_needs_no_such_device_to_be_described() -> None:
    assert MixedPrecision("bf16-mixed", torch.device("cuda", 3)).device == "cuda"
    assert MixedPrecision("16-mixed", "cuda:1").plan()["compute"] == torch.float16
    assert not torch.cuda.is_initialized()


def test_bad_arguments_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="Did you mean 'bf16-mixed'"):
        MixedPrecision("bf16mixed", "cpu")
    with pytest.raises(ValueError, match="Remove scaler="):
        MixedPrecision("bf16-mixed", "cpu", GradScaler("cpu"))
    with pytest.raises(ValueError, match="does not know"):
        MixedPrecision("16-mixed", "toaster")
    with pytest.raises(ValueError, match="no autocast"):
        MixedPrecision("16-mixed", "vulkan")
    with pytest.raises(ValueError, match="it is for '16-mixed'"):
        ScaledMixedPrecision("bf16-mixed", "cpu")
    with pytest.raises(RuntimeError, match="disabled"):
        MixedPrecision("16-mixed", "cpu", GradScaler("cpu", enabled=False))


def test_a_subclass_cannot_lose_the_scaler() -> None:
    class Mine(MixedPrecision):
        pass

    assert type(Mine("bf16-mixed", "cpu")) is Mine
    with pytest.raises(ValueError, match="Derive it from ScaledMixedPrecision"):
        Mine("16-mixed", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without CUDA")
def test_16_mixed_for_cuda_without_cuda_is_an_error_at_first_use_not_an_unscaled_run() -> None:
    precision = MixedPrecision("16-mixed", "cuda")
    with pytest.raises(RuntimeError, match="no usable CUDA device"):
        precision.scale(torch.ones(1))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fused", [False, True])
def test_16_mixed_training_on_cuda_equals_a_raw_scaler_loop_bit_for_bit(fused) -> None:
    precision = MixedPrecision("16-mixed", "cuda", cache_casts=True)
    ours, theirs = make_net().cuda(), make_net().cuda()
    scaler = GradScaler("cuda")
    first = torch.optim.Adam(ours.parameters(), lr=1e-2, fused=fused)
    second = torch.optim.Adam(theirs.parameters(), lr=1e-2, fused=fused)
    for x, y in batches():
        x, y = x.cuda(), y.cuda()
        first.zero_grad()
        with precision.forward_context():
            loss = nn.functional.mse_loss(ours(x), y)
        precision.scale(loss).backward()
        precision.unscale(first)
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.1)
        precision.step(first)
        precision.update()

        second.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = nn.functional.mse_loss(theirs(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(second)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        scaler.step(second)
        scaler.update()
    assert_equal_weights(ours, theirs)
    assert precision.state_dict() == scaler.state_dict()
