"""The tests of a strategy in several processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fulmen_conformance._kit import need
from fulmen_conformance._strategy_kit import StrategyKit
from fulmen_conformance._world import settle
from fulmen_protocols import SupportsCollectives

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from fulmen_protocols import Strategy

__all__ = ["RankTests"]


class RankTests(StrategyKit):
    """Every rank runs the check of the same name in ``_strategy_checks``."""

    @pytest.fixture
    def factory(self) -> str | None:
        """``"module:callable"`` or ``"/path/file.py:callable"``: of no arguments, returns the strategy under test."""
        return None

    @pytest.fixture
    def kit_check(
        self, strategy: Strategy, factory: str | None, num_processes: int, device: torch.device, timeout_s: float
    ) -> Callable[[str], None]:
        """Runs one check on every rank. Not to be replaced."""
        need(strategy, SupportsCollectives)
        if factory is None:
            pytest.fail(
                f"{type(strategy).__name__} offers SupportsCollectives, so its tests start processes: define a fixture "
                '`factory` that returns "module:callable".',
                pytrace=False,
            )
        return lambda name: settle("_strategy_checks", name, factory, num_processes, device, timeout_s)

    def test_every_rank_knows_its_place(self, kit_check: Callable[[str], None]) -> None:
        """On failure look at ``setup_environment`` and at ``collectives``: rank, world size, root device."""
        kit_check("place_in_the_world")

    def test_its_collectives_reach_every_rank(self, kit_check: Callable[[str], None]) -> None:
        """A first look; ``CollectivesConformance`` is the proof. On failure look at the group ``collectives`` uses."""
        kit_check("collectives")

    def test_replicas_start_with_the_weights_of_rank_zero(self, kit_check: Callable[[str], None]) -> None:
        """Ranks create different values. On failure look at ``place``: nobody broadcasts."""
        kit_check("replicas_start_equal")

    def test_training_on_several_ranks_follows_the_mean_gradient(self, kit_check: Callable[[str], None]) -> None:
        """Against plain PyTorch on all batches. On failure look at the reduction: a sum, missing, wrong batches."""
        kit_check("training_follows_the_mean_gradient")

    def test_ranks_end_with_the_same_weights_bit_for_bit(self, kit_check: Callable[[str], None]) -> None:
        """On failure look for parameters that are not reduced: every rank must step with one gradient."""
        kit_check("ranks_end_equal")

    def test_within_no_sync_gradients_stay_local(self, kit_check: Callable[[str], None]) -> None:
        """And the backward after it reduces their sum. On failure look at ``no_sync``: forward must be inside too."""
        kit_check("no_sync")

    def test_a_bound_method_reduces_gradients_too(self, kit_check: Callable[[str], None]) -> None:
        """On failure look at ``bind_method``: it must enter the wrapper, not the original module."""
        kit_check("bound_methods_reduce")

    def test_clipping_uses_the_norm_of_the_whole_gradient(self, kit_check: Callable[[str], None]) -> None:
        """Equal on every rank, equal to the formula. On failure look at ``clip_grad_norm``: norm of one shard only."""
        kit_check("clipping")

    def test_inference_uses_the_weights_of_rank_zero(self, kit_check: Callable[[str], None]) -> None:
        """On failure look at ``place_for_inference``: nobody broadcasts."""
        kit_check("inference_placement")

    def test_full_state_is_whole_on_rank_zero_and_loads_again(self, kit_check: Callable[[str], None]) -> None:
        """On failure look at ``module_state(full=True)`` and ``load_module_state``: names, shapes, ranks left out."""
        kit_check("sharded_state")

    def test_every_part_of_the_data_is_read(self, kit_check: Callable[[str], None]) -> None:
        """On failure look at ``data_parallel_rank``: over all ranks it takes each value below the size."""
        kit_check("data_parallel_ranks")

    def test_the_group_can_be_left_and_joined_again(self, kit_check: Callable[[str], None]) -> None:
        """Two whole cycles, ``teardown`` twice each. On failure look at process groups that stay behind."""
        kit_check("two_cycles")
