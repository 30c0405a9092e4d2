"""The tests of a strategy whose engine does by itself what other runs do with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional as F

from fulmen_conformance._kit import need
from fulmen_conformance._reference import adam, batches, plain_training, sgd, tiny_net
from fulmen_conformance._strategy_kit import StrategyKit
from fulmen_conformance._strategy_steps import differences, forward_backward, full_state, prepare, step, train
from fulmen_protocols import (
    OwnsAccumulation,
    OwnsCheckpoints,
    OwnsGradClipping,
    OwnsOptimizerStep,
    OwnsSchedulers,
    SupportsWindowEnds,
)

if TYPE_CHECKING:
    from pathlib import Path

    from fulmen_conformance._reference import Batch
    from fulmen_protocols import Strategy, Topology

__all__ = ["EngineTests"]


class EngineTests(StrategyKit):
    """Accumulation, windows, clipping, schedulers, checkpoints and the step, where the strategy owns them."""

    def test_an_engine_that_accumulates_steps_once_a_window(self, strategy: Strategy, kit_topology: Topology) -> None:
        """Weights change on every second call. On failure look at ``set_accumulation`` and ``optimizer_step``."""
        need(strategy, OwnsAccumulation)
        strategy.setup_environment(kit_topology)
        cast("OwnsAccumulation", strategy).set_accumulation(2)
        module = tiny_net()
        placed, optimizer = prepare(strategy, module, sgd)

        changed = [_changes(strategy, module, placed, optimizer, batch) for batch in batches(4)]

        assert changed == [False, True, False, True]
        strategy.teardown()

    def test_an_engine_that_is_told_where_a_window_ends_steps_there(
        self, strategy: Strategy, kit_topology: Topology
    ) -> None:
        """After one batch and after three, of windows of four. On failure look at ``set_window_end``."""
        need(strategy, SupportsWindowEnds)
        strategy.setup_environment(kit_topology)
        cast("OwnsAccumulation", strategy).set_accumulation(4)
        module = tiny_net()
        placed, optimizer = prepare(strategy, module, sgd)

        changed: list[bool] = []
        for batch, is_end in zip(batches(4), (True, False, False, True), strict=True):
            cast("SupportsWindowEnds", strategy).set_window_end(placed, is_end)
            changed.append(_changes(strategy, module, placed, optimizer, batch))

        assert changed == [True, False, False, True]
        strategy.teardown()

    def test_an_engine_that_clips_steps_as_pytorch_does_after_clipping(
        self, strategy: Strategy, kit_topology: Topology
    ) -> None:
        """By norm, or refused with the value. On failure look at ``set_clipping``: called before ``place``."""
        need(strategy, OwnsGradClipping)
        device, data = kit_topology.device, batches(2)
        plain = tiny_net(device=device)
        plain_optimizer = sgd(plain.parameters())
        for x, y in batches(2, device=device):
            plain_optimizer.zero_grad()
            F.mse_loss(plain(x), y).backward()  # type: ignore[no-untyped-call, unused-ignore]
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            plain_optimizer.step()
        strategy.setup_environment(kit_topology)
        cast("OwnsGradClipping", strategy).set_clipping(0.1)
        module = tiny_net()
        placed, optimizer = prepare(strategy, module, sgd)

        train(strategy, placed, optimizer, data)

        assert differences(full_state(strategy, module, placed), plain.state_dict(), tolerance=1e-5) == []
        strategy.teardown()

    def test_an_engine_steps_the_schedulers_it_has_taken_and_no_longer_those_released(
        self, kit_ready: Strategy
    ) -> None:
        """After each optimizer step. On failure look at ``take_scheduler`` and ``release_schedulers``."""
        need(kit_ready, OwnsSchedulers)
        owner = cast("OwnsSchedulers", kit_ready)
        placed, optimizer = prepare(kit_ready, tiny_net(), sgd)
        assert list(owner.release_schedulers(placed)) == []
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        first = optimizer.param_groups[0]["lr"]
        owner.take_scheduler(placed, scheduler)

        train(kit_ready, placed, optimizer, batches(2))
        assert optimizer.param_groups[0]["lr"] == first / 4
        assert list(owner.release_schedulers(placed)) == [scheduler]
        train(kit_ready, placed, optimizer, batches(1))

        assert optimizer.param_groups[0]["lr"] == first / 4

    def test_an_engine_s_checkpoint_brings_back_module_optimizer_and_the_rest(
        self, kit_ready: Strategy, tmp_path: Path
    ) -> None:
        """Then training goes on equally. On failure look at ``OwnsCheckpoints``'s methods."""
        need(kit_ready, OwnsCheckpoints)
        owner, path = cast("OwnsCheckpoints", kit_ready), str(tmp_path / "run.ckpt")
        first, second = tiny_net(), tiny_net(seed=1)
        placed, optimizer = prepare(kit_ready, first, adam)
        train(kit_ready, placed, optimizer, batches(2))

        owner.save_checkpoint(placed, {"epoch": 3, "rng": torch.ones(2)}, path)

        assert owner.owns_checkpoint(path)
        rest = owner.read_rest(path, None)
        assert rest.keys() == {"epoch", "rng"}
        assert rest["epoch"] == 3
        placed_again, optimizer_again = prepare(kit_ready, second, adam)
        owner.load_checkpoint(placed_again, path, optimizers=True, strict=True)
        train(kit_ready, placed, optimizer, batches(2, seed=1))
        train(kit_ready, placed_again, optimizer_again, batches(2, seed=1))
        states = [full_state(kit_ready, m, p) for m, p in ((first, placed), (second, placed_again))]
        assert differences(states[1], states[0]) == []

    def test_an_engine_s_step_evaluates_the_closure(self, kit_ready: Strategy, tolerance: float) -> None:
        """LBFGS and Lightning's closures need it. On failure look at ``optimizer_step``: ``closure`` dropped."""
        need(kit_ready, OwnsOptimizerStep)
        module = tiny_net()
        placed, optimizer = prepare(kit_ready, module, sgd)
        expected = plain_training(tiny_net(device=kit_ready.root_device), sgd, batches(1, device=kit_ready.root_device))

        def closure() -> object:
            optimizer.zero_grad()
            return forward_backward(kit_ready, placed, batches(1)[0])

        cast("OwnsOptimizerStep", kit_ready).optimizer_step(optimizer, placed, closure)

        assert differences(full_state(kit_ready, module, placed), expected.state_dict(), tolerance=tolerance) == []


def _changes(
    strategy: Strategy, module: torch.nn.Module, placed: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Batch
) -> bool:
    """Whether the weights are others after ``batch`` and a call of the step."""
    before = full_state(strategy, module, placed)
    forward_backward(strategy, placed, batch)
    step(strategy, optimizer, placed)
    return differences(full_state(strategy, module, placed), before) != []
