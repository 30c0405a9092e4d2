"""The kit for strategies."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
import torch
from torch.nn import functional as F

from fulmen_conformance._kit import need, offers, whole_or_absent
from fulmen_conformance._reference import adam, batches, equal_bits, free_port, plain_training, sgd, tiny_net
from fulmen_conformance._strategy_engine import EngineTests
from fulmen_conformance._strategy_ranks import RankTests
from fulmen_conformance._strategy_steps import (
    ABILITIES,
    backward,
    differences,
    forward_backward,
    full_state,
    gradients,
    prepare,
    step,
    train,
)
from fulmen_protocols import (
    OwnsAccumulation,
    OwnsBackward,
    Strategy,
    SupportsBoundMethods,
    SupportsDataParallel,
    SupportsGradClipping,
    SupportsInferencePlacement,
    SupportsLaunch,
    SupportsLoaderProcessing,
    SupportsNoSync,
    SupportsPrecisionPlan,
    SupportsShardedState,
    Topology,
    missing_members,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from fulmen_protocols import PrecisionPlan

__all__ = ["StrategyConformance"]


class StrategyConformance(EngineTests, RankTests):
    """Proves a ``Strategy`` against plain PyTorch, in one process and, where it offers collectives, in several.

    Give the fixture ``strategy``; ``device`` where it is not for the CPU; and ``factory`` for one of several processes.
    The strategy of the fixture runs as the only process of its group.
    """

    def test_it_has_every_member_of_the_protocol(self, strategy: Strategy) -> None:
        """``Strategy`` has no optional member. On failure look at the names listed as missing."""
        assert missing_members(Strategy, strategy) == []

    def test_each_ability_is_whole_or_absent(self, strategy: Strategy) -> None:
        """Half an ability is never used. On failure add the members listed, or remove their siblings."""
        assert whole_or_absent(strategy, ABILITIES) == []

    def test_its_root_device_is_this_process_s(self, kit_ready: Strategy, kit_topology: Topology) -> None:
        """On failure look at ``root_device`` after ``setup_environment``: it is ``topology.device``."""
        assert kit_ready.root_device == kit_topology.device

    def test_modules_are_created_with_the_values_of_plain_pytorch(self, kit_ready: Strategy) -> None:
        """One seed, one model. On failure look at ``module_context(empty=False)``: draws, dtypes, devices."""
        torch.manual_seed(3)
        expected = torch.nn.Linear(4, 4)
        torch.manual_seed(3)

        with kit_ready.module_context(empty=False):
            got = torch.nn.Linear(4, 4)

        assert got.weight.dtype == torch.float32
        if got.weight.device.type == "cpu":  # other devices have random numbers of their own
            assert equal_bits(got.weight, expected.weight)
            assert equal_bits(got.bias, expected.bias)

    def test_an_empty_module_can_be_placed_and_loaded(self, kit_ready: Strategy) -> None:
        """A checkpoint will fill it. On failure look at ``module_context(empty=True)``, ``place`` of its modules."""
        with kit_ready.module_context(empty=True):
            module = torch.nn.Linear(4, 2)

        placed = kit_ready.place(module)

        weights = {"weight": torch.ones(2, 4), "bias": torch.zeros(2)}
        if offers(kit_ready, SupportsShardedState):
            cast("SupportsShardedState", kit_ready).load_module_state(placed, weights, strict=True)
        else:
            module.load_state_dict(weights)
        assert placed(torch.ones(1, 4, device=kit_ready.root_device)).tolist() == [[4.0, 4.0]]

    @pytest.mark.parametrize("empty", [False, True])
    def test_module_context_leaves_torch_as_it_was(self, kit_ready: Strategy, empty: bool) -> None:
        """Also after an error inside. On failure look for a default device or initialiser that is not put back."""
        before = (torch.get_default_dtype(), torch.tensor(1.0).device)
        try:
            with pytest.raises(KeyError), kit_ready.module_context(empty=empty):
                raise KeyError

            torch.manual_seed(3)
            first = torch.nn.Linear(2, 2)
            torch.manual_seed(3)

            assert (torch.get_default_dtype(), torch.tensor(1.0).device) == before
            assert equal_bits(torch.nn.Linear(2, 2).weight, first.weight)
            assert first.weight.abs().sum() > 0
        finally:  # what leaks must not reach the tests that follow
            torch.set_default_dtype(before[0])

    def test_a_placed_module_computes_what_the_module_computed(self, kit_ready: Strategy, tolerance: float) -> None:
        """On failure look at ``place``: weights changed, or left on another device."""
        module, x = tiny_net(), batches(1)[0][0]
        expected = tiny_net(device=kit_ready.root_device)(x.to(kit_ready.root_device))

        placed = kit_ready.place(module)

        assert _same(placed(x.to(kit_ready.root_device)), expected, tolerance)
        assert {parameter.device for parameter in placed.parameters()} == {kit_ready.root_device}

    @pytest.mark.parametrize("optimizer", [sgd, adam], ids=["SGD with momentum", "Adam"])
    def test_training_gives_the_weights_of_plain_pytorch_bit_for_bit(
        self, kit_ready: Strategy, optimizer: Callable[[object], torch.optim.Optimizer], tolerance: float
    ) -> None:
        """Five steps. On failure look at ``prepare_optimizers``, ``backward``, ``optimizer_step``: scaled losses?"""
        expected = plain_training(
            tiny_net(device=kit_ready.root_device), optimizer, batches(5, device=kit_ready.root_device)
        )
        module = tiny_net()

        placed, prepared = prepare(kit_ready, module, optimizer)
        train(kit_ready, placed, prepared, batches(5))

        assert differences(full_state(kit_ready, module, placed), expected.state_dict(), tolerance=tolerance) == []

    def test_the_module_itself_has_the_trained_weights_by_canonical_name(self, kit_ready: Strategy) -> None:
        """Checkpoints are written from it. On failure look at ``place``: a copy, or names with a wrapper's prefix."""
        module = tiny_net()
        placed, optimizer = prepare(kit_ready, module, sgd)

        train(kit_ready, placed, optimizer, batches(1))

        assert list(full_state(kit_ready, module, placed)) == list(tiny_net().state_dict())
        assert differences(full_state(kit_ready, module, placed), tiny_net().state_dict()) != []

    def test_gradients_accumulate_over_batches(self, kit_ready: Strategy, tolerance: float) -> None:
        """Two backwards, one step, with ``no_sync`` where offered. On failure look for gradients zeroed in between."""
        if offers(kit_ready, OwnsAccumulation):
            pytest.skip("its engine accumulates by itself")
        data, module, plain = batches(2), tiny_net(), tiny_net(device=kit_ready.root_device)
        plain_optimizer = sgd(plain.parameters())
        for x, y in batches(2, device=kit_ready.root_device):
            F.mse_loss(plain(x), y).backward()  # type: ignore[no-untyped-call, unused-ignore]
        plain_optimizer.step()
        placed, optimizer = prepare(kit_ready, module, sgd)

        if offers(kit_ready, SupportsNoSync):
            with cast("SupportsNoSync", kit_ready).no_sync(placed):
                forward_backward(kit_ready, placed, data[0])
        else:
            forward_backward(kit_ready, placed, data[0])
        forward_backward(kit_ready, placed, data[1])
        step(kit_ready, optimizer, placed)

        assert differences(full_state(kit_ready, module, placed), plain.state_dict(), tolerance=tolerance) == []

    def test_a_bound_method_runs_the_module_s_method(self, kit_ready: Strategy, tolerance: float) -> None:
        """``training_step`` goes through the wrapper. On failure look at ``bind_method``: arguments, result, graph."""
        need(kit_ready, SupportsBoundMethods)
        module = tiny_net()
        placed, _ = prepare(kit_ready, module, sgd)
        x, y = batches(1, device=kit_ready.root_device)[0]
        bound = cast("SupportsBoundMethods", kit_ready).bind_method(placed, "loss_of")

        loss = bound((x, y))

        assert isinstance(loss, torch.Tensor)
        assert _same(loss, tiny_net(device=kit_ready.root_device).loss_of((x, y)), tolerance)
        backward(kit_ready, loss, placed)
        if not offers(kit_ready, OwnsBackward):  # an engine may keep gradients elsewhere
            assert all(parameter.grad is not None for parameter in placed.parameters())
        again = tiny_net(device=kit_ready.root_device)(x)
        assert _same(placed(x), again, tolerance), "forward itself is as before"

    @pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
    def test_clipping_by_norm_is_pytorch_s(self, kit_ready: Strategy, norm_type: float) -> None:
        """Norm and gradients. On failure look at ``clip_grad_norm``: the returned norm is the one before clipping."""
        need(kit_ready, SupportsGradClipping)
        module = tiny_net()
        placed, optimizer = prepare(kit_ready, module, sgd)
        plain = tiny_net(device=kit_ready.root_device)
        x, y = batches(1, device=kit_ready.root_device)[0]
        F.mse_loss(plain(x), y).backward()  # type: ignore[no-untyped-call, unused-ignore]
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1, norm_type)
        forward_backward(kit_ready, placed, batches(1)[0])

        norm = cast("SupportsGradClipping", kit_ready).clip_grad_norm(placed, optimizer, 0.1, norm_type=norm_type)

        torch.testing.assert_close(norm, expected)
        assert norm.shape == ()
        torch.testing.assert_close(gradients(placed), gradients(plain))

    def test_a_norm_that_is_not_finite_is_an_error_when_asked(self, kit_ready: Strategy) -> None:
        """On failure look at ``error_if_nonfinite`` of ``clip_grad_norm``."""
        need(kit_ready, SupportsGradClipping)
        placed, optimizer = prepare(kit_ready, tiny_net(), sgd)
        x, y = batches(1)[0]
        forward_backward(kit_ready, placed, (x * float("nan"), y))

        with pytest.raises(RuntimeError):
            cast("SupportsGradClipping", kit_ready).clip_grad_norm(placed, optimizer, 1.0, error_if_nonfinite=True)

    def test_clipping_by_value_is_pytorch_s(self, kit_ready: Strategy) -> None:
        """On failure look at ``clip_grad_value``: every element, both signs, in place."""
        need(kit_ready, SupportsGradClipping)
        placed, optimizer = prepare(kit_ready, tiny_net(), sgd)
        plain = tiny_net(device=kit_ready.root_device)
        x, y = batches(1, device=kit_ready.root_device)[0]
        F.mse_loss(plain(x), y).backward()  # type: ignore[no-untyped-call, unused-ignore]
        torch.nn.utils.clip_grad_value_(plain.parameters(), 0.05)
        forward_backward(kit_ready, placed, batches(1)[0])

        cast("SupportsGradClipping", kit_ready).clip_grad_value(placed, optimizer, 0.05)

        torch.testing.assert_close(gradients(placed), gradients(plain))

    def test_placing_for_inference_keeps_what_is_computed(self, kit_ready: Strategy, tolerance: float) -> None:
        """On failure look at ``place_for_inference``: weights, device, training mode."""
        need(kit_ready, SupportsInferencePlacement)
        x = batches(1)[0][0].to(kit_ready.root_device)

        placed = cast("SupportsInferencePlacement", kit_ready).place_for_inference(tiny_net())

        with torch.no_grad():
            assert _same(placed(x), tiny_net(device=kit_ready.root_device)(x), tolerance)

    def test_a_precision_plan_is_honoured_or_refused(
        self, strategy: Strategy, kit_topology: Topology, tolerance: float
    ) -> None:
        """float32 trains bit for bit; bfloat16 computes in bfloat16 or is a ``ValueError``. Look at the plan's use."""
        need(strategy, SupportsPrecisionPlan)
        plans = cast("SupportsPrecisionPlan", strategy)
        seen: list[torch.dtype] = []
        device = kit_topology.device
        expected = plain_training(tiny_net(device=device), sgd, batches(2, device=device))
        for dtype in (torch.float32, torch.bfloat16):
            plan: PrecisionPlan = {
                "parameter": torch.float32,
                "compute": dtype,
                "reduction": torch.float32,
                "output": torch.float32,
                "scaler": "none",
            }
            strategy.setup_environment(kit_topology._replace(main_port=free_port()))
            try:
                plans.apply_precision_plan(plan)
            except ValueError as refusal:
                if dtype is torch.float32 or "bfloat16" not in str(refusal):
                    pytest.fail(f"refused, or without naming what was asked: {refusal}")
                strategy.teardown()
                continue
            weights = _weights_after_training(strategy, seen.append)
            strategy.teardown()
            if dtype is torch.float32:
                assert differences(weights, expected.state_dict(), tolerance=tolerance) == []
            assert seen[-1] == dtype
            assert {value.dtype for value in weights.values()} == {torch.float32, torch.int64}

    def test_one_process_reads_all_of_the_data(self, kit_ready: Strategy) -> None:
        """On failure look at ``data_parallel_rank`` and ``data_parallel_size`` with one process."""
        need(kit_ready, SupportsDataParallel)
        strategy = cast("SupportsDataParallel", kit_ready)

        assert (strategy.data_parallel_rank, strategy.data_parallel_size) == (0, 1)

    def test_a_processed_loader_gives_the_same_batches_on_the_device(self, kit_ready: Strategy) -> None:
        """Twice, as two epochs do. On failure look at ``process_loader``: order, number, device, a used-up iterator."""
        need(kit_ready, SupportsLoaderProcessing)
        data = batches(5)

        loader = cast("SupportsLoaderProcessing", kit_ready).process_loader(data)

        for _ in range(2):
            got = cast("list[tuple[torch.Tensor, torch.Tensor]]", list(loader))
            assert len(got) == 5
            for (x, y), (expected_x, expected_y) in zip(got, data, strict=True):
                assert x.device == y.device == kit_ready.root_device
                assert equal_bits(x, expected_x)
                assert equal_bits(y, expected_y)

    @pytest.mark.parametrize("full", [True, False])
    def test_state_that_was_taken_can_be_given_back(self, kit_ready: Strategy, full: bool) -> None:
        """Module and Adam; then training goes on equally. On failure look at ``SupportsShardedState``'s methods."""
        need(kit_ready, SupportsShardedState)
        sharded = cast("SupportsShardedState", kit_ready)
        assert sharded.state_kind in ("full", "sharded")
        first, second = tiny_net(), tiny_net(seed=1)
        placed, optimizer = prepare(kit_ready, first, adam)
        train(kit_ready, placed, optimizer, batches(3))
        placed_again, optimizer_again = prepare(kit_ready, second, adam)

        sharded.load_module_state(placed_again, sharded.module_state(placed, full=full), strict=True)
        sharded.load_optimizer_state(
            placed_again, optimizer_again, sharded.optimizer_state(placed, optimizer, full=full)
        )
        train(kit_ready, placed, optimizer, batches(2, seed=1))
        train(kit_ready, placed_again, optimizer_again, batches(2, seed=1))

        states = [full_state(kit_ready, m, p) for m, p in ((first, placed), (second, placed_again))]
        assert differences(states[1], states[0]) == []

    def test_loading_a_state_with_a_missing_name_is_an_error_when_strict(self, kit_ready: Strategy) -> None:
        """On failure look at ``strict`` of ``load_module_state``."""
        need(kit_ready, SupportsShardedState)
        sharded = cast("SupportsShardedState", kit_ready)
        placed = kit_ready.place(tiny_net())
        state = {k: v for k, v in sharded.module_state(placed, full=True).items() if k != "first.weight"}

        with pytest.raises(Exception, match=r"first\.weight"):
            sharded.load_module_state(placed, state, strict=True)
        sharded.load_module_state(placed, state, strict=False)

    def test_its_launcher_is_named(self, strategy: Strategy) -> None:
        """On failure look at ``launcher``: the name of an entry point, known before anything is set up."""
        need(strategy, SupportsLaunch)
        name = cast("SupportsLaunch", strategy).launcher

        assert isinstance(name, str)
        assert name

    def test_teardown_can_be_called_twice_and_the_cycle_starts_again(
        self, strategy: Strategy, kit_topology: Topology, tolerance: float
    ) -> None:
        """Test after fit. On failure look at what ``teardown`` releases, and at state that survives it."""
        expected = plain_training(tiny_net(device=kit_topology.device), sgd, batches(2, device=kit_topology.device))
        for _ in range(2):
            strategy.setup_environment(kit_topology._replace(main_port=free_port()))
            got = _weights_after_training(strategy)
            assert differences(got, expected.state_dict(), tolerance=tolerance) == []
            strategy.teardown()
            strategy.teardown()


def _same(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return equal_bits(got, expected) or bool(
        tolerance and torch.allclose(got.cpu(), expected.cpu(), rtol=tolerance, atol=tolerance)
    )


def _weights_after_training(
    strategy: Strategy, seen: Callable[[torch.dtype], object] = lambda _dtype: None
) -> dict[str, torch.Tensor]:
    """Train two batches; what was placed dies with this frame, before the group that it uses."""
    module = tiny_net()
    module.second.register_forward_hook(lambda _layer, _inputs, out: seen(out.dtype))
    placed, optimizer = prepare(strategy, module, sgd)
    train(strategy, placed, optimizer, batches(2))
    return full_state(strategy, module, placed)
