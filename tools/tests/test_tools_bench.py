"""The arithmetic and the counters of the measurements."""

from __future__ import annotations

import pytest
import torch
from tools.bench.contestants import Raw
from tools.bench.instructions import FIRST, LAST, Counter
from tools.bench.memory import slope
from tools.bench.step_overhead import summary
from tools.bench.workload import Clock, loader


def test_the_slope_is_that_of_the_least_squares_line() -> None:
    assert slope([(0, 1), (1, 3), (2, 5)]) == pytest.approx(2)
    assert slope([(0, 1), (1, 1), (2, 1)]) == 0
    # numpy.polyfit([0, 1, 2, 3], [0, 2, 1, 3], 1)[0]
    assert slope([(0, 0), (1, 2), (2, 1), (3, 3)]) == pytest.approx(0.8)


def test_a_summary_pairs_the_readings_of_a_round_before_it_takes_the_median() -> None:
    rounds = [[100.0, 110.0, 150.0, 165.0], [200.0, 210.0, 220.0, 231.0], [100.0, 100.0, 110.0, 120.0]]

    found = summary(rounds)

    assert found["overhead_us"] == 20
    assert found["ratio"] == pytest.approx(1.1)
    assert found["cpu_ratio"] == pytest.approx(1.2)


def test_counts_of_the_raw_loop_are_the_same_every_time() -> None:
    def count() -> int:
        counter = Counter(lambda file: False, "calls")
        Raw().run("bare", LAST + 10, counter)
        return counter.counts.calls

    count()  # the first optimizer imports and compiles things

    first, second = count(), count()

    assert first == second
    assert first > 50 * (LAST - FIRST)


def test_lines_are_counted_in_the_files_that_are_asked_for_and_frames_that_run_already() -> None:
    counter = Counter(lambda file: file == __file__, "lines")
    executed = 0

    for _ in range(LAST + 1):
        counter()
        executed += 1  # three lines a turn: the for, the call, this one

    assert executed == LAST + 1
    assert counter.counts.lines == 3 * (LAST - FIRST)


def test_a_loader_may_repeat_few_batches_and_gives_as_many_as_asked() -> None:
    batches = list(loader(7, distinct=3))

    assert len(batches) == 7
    assert torch.equal(batches[0][0], batches[3][0])
    assert not torch.equal(batches[0][0], batches[1][0])


def test_a_clock_knows_the_median_step() -> None:
    clock = Clock()
    clock.wall_s = [0.0, 9.0, 10.0, 11.0, 12.0, 99.0]

    assert clock.median_step_us(1) == pytest.approx(1e6)
