"""The plan decides when a run ends, validates, logs and steps; compared with a brute-force count."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fulmen.plan import Plan
from fulmen.progress import Progress


@pytest.mark.proves("9.13")
@given(batches=st.integers(1, 40), accumulate=st.integers(1, 9))
def test_a_window_is_stepped_when_full_and_at_the_end_of_the_epoch(batches: int, accumulate: int) -> None:
    plan = Plan(batches=batches, accumulate=accumulate)

    steps = sum(plan.steps(batch, plan.is_last(batch)) for batch in range(batches))

    assert steps == math.ceil(batches / accumulate)


@pytest.mark.proves("9.10")
@given(batches=st.integers(1, 30), every=st.integers(1, 30), epochs=st.integers(1, 4))
def test_validation_by_batches_counts_within_the_epoch_or_across_epochs(batches: int, every: int, epochs: int) -> None:
    for across in (False, True):
        plan = Plan(
            batches=batches,
            validates=True,
            validate_every_batches=every,
            validate_every_epochs=None if across else 1,
        )
        validated, expected, total = [], [], 0
        for epoch in range(epochs):
            for batch in range(1, batches + 1):
                total += 1
                progress = Progress(epoch=epoch, batch=batch, total_batches=total)
                validated.append(plan.validation_due(progress, batch == batches))
                expected.append((total if across else batch) % every == 0)
        assert validated == expected


@pytest.mark.proves("9.10")
def test_validation_at_the_end_of_every_second_epoch() -> None:
    plan = Plan(batches=3, validates=True, validate_every_epochs=2)

    due = [
        plan.validation_due(Progress(epoch=epoch, batch=batch, total_batches=1), batch == 3)
        for epoch in range(4)
        for batch in (1, 2, 3)
    ]

    assert due == [False] * 5 + [True] + [False] * 5 + [True]


@pytest.mark.proves("9.42")
def test_a_request_to_stop_waits_for_min_epochs_and_min_steps() -> None:
    plan = Plan(max_epochs=10, min_epochs=2, min_steps=5, batches=3)
    progress = Progress(epoch=1, updates=7)
    progress.stop("enough")

    assert not plan.finished(progress)
    progress.epoch = 2
    assert plan.finished(progress)


@pytest.mark.proves("9.5")
def test_training_ends_at_max_steps_or_max_epochs_whichever_comes_first() -> None:
    plan = Plan(max_epochs=3, max_steps=7, batches=4)

    assert not plan.finished(Progress(epoch=2, updates=6))
    assert plan.finished(Progress(epoch=1, updates=7))
    assert plan.finished(Progress(epoch=3, updates=3))


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (Plan(max_epochs=3, batches=10, accumulate=4), 9),
        (Plan(max_epochs=3, max_steps=5, batches=10), 5),
        (Plan(max_epochs=-1, max_steps=5), 5),
        (Plan(max_epochs=-1), math.inf),
    ],
)
def test_the_number_of_steps_of_a_run_is_known_in_advance(plan: Plan, expected: float) -> None:
    assert plan.estimated_steps() == expected


def test_progress_survives_a_round_trip_and_refuses_what_it_does_not_know() -> None:
    progress = Progress(epoch=2, batch=3, total_batches=13, updates=6, epoch_started=True)
    progress.stop("not saved")
    restored = Progress()
    restored.load_state_dict(progress.state_dict())

    assert restored == Progress(epoch=2, batch=3, total_batches=13, updates=6, epoch_started=True)
    with pytest.raises(ValueError, match="schema version 9"):
        restored.load_state_dict({"version": 9})
    with pytest.raises(ValueError, match="'colour' = 1"):
        restored.load_state_dict({"version": 1, "colour": 1})
