"""The kit for collectives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fulmen_conformance._processes import KitOfProcesses
from fulmen_conformance._world import settle

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["CollectivesConformance"]


class CollectivesConformance(KitOfProcesses):
    """Proves ``Collectives`` in real processes.

    Give the fixture ``factory``; a backend of one process only also ``num_processes`` = 1. Each test runs on every
    rank; a failure shows the traceback of each rank that failed.
    """

    @pytest.fixture
    def factory(self) -> str:
        """``"module:callable"`` or ``"/path/file.py:callable"``: takes a ``Topology``, joins, returns the backend."""
        raise NotImplementedError('define a fixture `factory` that returns "module:callable"')

    @pytest.fixture
    def kit_check(
        self, factory: str, num_processes: int, device: torch.device, timeout_s: float
    ) -> Callable[[str], None]:
        """Runs one check on every rank. Not to be replaced."""
        return lambda name: settle("_collectives_checks", name, factory, num_processes, device, timeout_s)

    def test_rank_and_world_size_are_those_of_the_topology(self, kit_check: Callable[[str], None]) -> None:
        """On failure look at ``rank`` and ``world_size``, and at the members listed as missing."""
        kit_check("ranks")

    def test_a_barrier_holds_until_the_last_rank_has_come(self, kit_check: Callable[[str], None]) -> None:
        """On failure look at ``barrier``: does it reach the group at all?"""
        kit_check("barrier")

    def test_broadcast_writes_the_source_s_tensor_in_place(self, kit_check: Callable[[str], None]) -> None:
        """From every source. On failure look at ``broadcast``: the ``source`` argument, copies instead of writes."""
        kit_check("broadcast")

    def test_broadcast_writes_through_views(self, kit_check: Callable[[str], None]) -> None:
        """On failure look for ``.contiguous()`` in ``broadcast``: its copy is filled, and the view is not."""
        kit_check("broadcast_views")

    def test_broadcast_object_gives_the_source_s_object(self, kit_check: Callable[[str], None]) -> None:
        """Sizes differ by rank. On failure look at ``broadcast_object``: the ``source`` argument, sizes."""
        kit_check("broadcast_object")

    def test_all_reduce_is_the_formula_and_leaves_its_input(self, kit_check: Callable[[str], None]) -> None:
        """Mean, sum, min, max. On failure look at ``all_reduce``: the operation, the division, a missing ``clone``."""
        kit_check("all_reduce")

    def test_all_reduce_means_mean_unless_told_otherwise(self, kit_check: Callable[[str], None]) -> None:
        """A scalar of shape (). On failure look at the default of ``op``."""
        kit_check("all_reduce_defaults_to_mean")

    def test_an_integer_mean_is_the_floor_of_the_true_mean(self, kit_check: Callable[[str], None]) -> None:
        """Negative numbers too. On failure look at the division: ``rounding_mode="floor"``, after the sum."""
        kit_check("all_reduce_of_integers")

    def test_all_reduce_keeps_the_dtype(self, kit_check: Callable[[str], None]) -> None:
        """float64, bfloat16, float16. On failure look at casts around the reduction."""
        kit_check("all_reduce_of_other_dtypes")

    def test_all_reduce_takes_views(self, kit_check: Callable[[str], None]) -> None:
        """Transposed, with gaps. On failure look at the memory layout that is handed to the backend."""
        kit_check("all_reduce_of_views")

    def test_a_reduction_that_is_begun_gives_the_same_when_it_is_asked_for(
        self, kit_check: Callable[[str], None]
    ) -> None:
        """Others may be begun in between, and the input changed. Where ``begin_all_reduce`` is offered.

        On failure look there: a missing copy of the input, a result that does not wait.
        """
        kit_check("begin_all_reduce")

    def test_all_gather_stacks_in_rank_order(self, kit_check: Callable[[str], None]) -> None:
        """Matrices, scalars, views. On failure look at ``all_gather``: concatenation instead of a new first dim."""
        kit_check("all_gather")

    def test_all_gather_carries_no_gradient_unless_asked(self, kit_check: Callable[[str], None]) -> None:
        """On failure look at ``differentiable=False``: the result must be detached."""
        kit_check("all_gather_without_gradient")

    def test_all_gather_sums_the_gradients_of_all_ranks(self, kit_check: Callable[[str], None]) -> None:
        """Each rank weighs entries differently. On failure look at the backward: it sums, and does not average."""
        kit_check("all_gather_with_gradient")

    def test_all_gather_object_lists_in_rank_order(self, kit_check: Callable[[str], None]) -> None:
        """On failure look at ``all_gather_object``: order, and objects of different size."""
        kit_check("all_gather_object")
