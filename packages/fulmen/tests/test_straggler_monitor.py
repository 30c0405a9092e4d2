"""StragglerMonitor without ranks: what is slow by its times, and what a run of one process pays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.data import DataLoader

import fulmen
from fulmen._watched_parts import watched
from fulmen.callbacks import Callback, StragglerMonitor
from fulmen.callbacks._slow_ranks import RankTimes, SlowRanks, Straggler, slowdowns
from fulmen.callbacks._step_times import usual
from fulmen.demos.boring_classes import BoringModel
from fulmen.fit import FitParts
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Sequence

# data, transfer, hooks, forward, backward, optimizer, waiting, outside
STEP = (0.001, 0.0, 0.001, 0.020, 0.010, 0.008, 0.020, 5.0)


def window(*ranks: Sequence[float], is_whole: bool = True) -> list[RankTimes]:
    return [RankTimes(f"host{rank}", 20, parts, is_whole) for rank, parts in enumerate(ranks)]


def with_part(index: int, seconds: float, waiting_s: float = STEP[6]) -> list[float]:
    parts = list(STEP)
    parts[index], parts[6] = seconds, waiting_s
    return parts


def test_a_rank_is_compared_with_the_median_of_the_others_part_by_part() -> None:
    ranks = slowdowns(window(STEP, STEP, with_part(0, 0.011, 0.010), STEP))

    slow = ranks[2]
    assert (slow.rank, slow.host, slow.part, slow.since_step) == (2, "host2", "data", 20)
    assert slow.late_s == pytest.approx(0.010)
    assert slow.part_late_s == pytest.approx(0.010)
    assert slow.slowdown == pytest.approx(10 / 40), "40 ms are the others' own work"
    assert slow.step_slowdown == pytest.approx(10 / 50), "without it a step would take 60 ms less 10"
    assert all(ranks[rank].slowdown == pytest.approx(0) for rank in (0, 1, 3))


def test_two_of_five_slow_ranks_are_both_seen() -> None:
    slow = with_part(3, 0.030)

    ranks = slowdowns(window(slow, STEP, STEP, slow, STEP))

    assert [each.rank for each in ranks if each.slowdown > 0.1] == [0, 3]


def test_where_work_hides_in_waiting_the_shortest_wait_counts_as_work() -> None:
    ranks = slowdowns(window(STEP, with_part(0, 0.011, 0.010), is_whole=False))

    assert ranks[1].slowdown == pytest.approx(10 / (40 + 10))


def course(threshold: float, patience: int, values: Sequence[float]) -> list[tuple[int, str]]:
    ranks, told = SlowRanks(threshold, patience), list[tuple[int, str]]()
    for index, slowdown in enumerate(values):
        each = Straggler(0, "host", "data", 10 * index, slowdown, slowdown, slowdown * 0.05, slowdown * 0.05)
        named, recovered = ranks.judge([each])
        told += [(index, f"slow since {one.since_step}") for one in named] + [(index, "well") for _ in recovered]
    return told


@pytest.mark.parametrize(
    ("patience", "values", "told"),
    [
        (2, [0.2, 0.2, 0.2], [(1, "slow since 0")]),
        (2, [0.2, 0.0, 0.2, 0.0, 0.2], []),
        (2, [0.0, 0.2, 0.3, 0.07, 0.07, 0.2, 0.2], [(2, "slow since 10")]),  # between half the threshold and all of it
        (2, [0.2, 0.2, 0.0, 0.04, 0.2, 0.2], [(1, "slow since 0"), (3, "well"), (5, "slow since 40")]),
        (1, [0.2], [(0, "slow since 0")]),
        (1, [0.1], []),
    ],
)
def test_a_rank_is_named_when_it_lasts_and_again_only_after_it_has_recovered(
    patience: int, values: list[float], told: list[tuple[int, str]]
) -> None:
    assert course(0.1, patience, values) == told


@pytest.mark.parametrize(
    ("step_slowdown", "late_s", "is_named"), [(0.03, 0.001, True), (0.02, 0.001, False), (0.03, 0.0004, False)]
)
def test_what_hardly_makes_a_step_longer_is_not_named(step_slowdown: float, late_s: float, is_named: bool) -> None:
    named, _ = SlowRanks(0.1, 1).judge([Straggler(0, "host", "data", 0, 0.5, step_slowdown, late_s, late_s)])

    assert bool(named) is is_named


def test_a_usual_step_counts_delays_that_come_every_few_steps_and_not_a_stall() -> None:
    def steps(*data_s: float) -> list[list[float]]:
        return [[s, *STEP[1:]] for s in data_s]

    quiet, bursts = usual(steps(*[0.001] * 20)), usual(steps(*([0.041, 0.001, 0.001, 0.001] * 5)))
    stalled = usual(steps(*[0.001] * 3, 9.0, 9.0, *[0.001] * 15))

    assert quiet is not None
    assert quiet == pytest.approx(list(STEP))
    assert stalled == pytest.approx(quiet)
    assert bursts is not None
    assert bursts[0] == pytest.approx(0.011, rel=0.3)
    assert usual(steps(0.001, 0.001)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 2}, "every_n_steps=2"),
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"patience": 0}, "patience=0"),
    ],
)
def test_values_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        StragglerMonitor(**arguments)


class SeesParts(Callback):
    """Keeps the parts that the loop gets."""

    def __init__(self) -> None:
        self.parts: list[FitParts] = []

    def watched_parts(self, trainer: fulmen.Trainer, parts: FitParts) -> FitParts:
        self.parts.append(parts)
        return parts


def test_one_process_runs_the_very_same_loop_and_no_hook_of_it() -> None:
    before, monitor, after = SeesParts(), StragglerMonitor(3), SeesParts()
    trainer = fulmen.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[before, monitor, after],
    )

    trainer.fit(BoringModel(), DataLoader(torch.randn(16, 32)))

    assert before.parts
    assert all(mine is theirs for mine, theirs in zip(before.parts, after.parts, strict=True))
    assert monitor.found == []
    explained = str(trainer.explain())
    assert "StragglerMonitor.on_before_backward" not in explained


def test_without_such_a_callback_parts_are_the_very_same() -> None:
    def step(batch: object, batch_idx: int) -> None:
        del batch, batch_idx

    parts = FitParts(step=step, accumulate=step)

    assert watched([Callback(), object()], fulmen.Trainer(accelerator="cpu", logger=False), parts) is parts
