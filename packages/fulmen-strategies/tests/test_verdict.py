"""Which rank kept the others waiting: from what each called and how far it had come."""

from __future__ import annotations

import time

import pytest

from fulmen_protocols import Position
from fulmen_strategies.launchers._failure import Failure
from fulmen_strategies.launchers._pulse import Collective
from fulmen_strategies.launchers._verdict import odd_rank, others, recent


def position(collectives: int, step: int = 5) -> Position:
    return Position(1, 0, step, step, 4711, collectives, time.time())


def calls(*numbers: int, what: str = "gloo:all_reduce [[4]]") -> list[Collective]:
    return [Collective("0", number, what) for number in numbers]


@pytest.mark.parametrize(
    ("begun", "odd"),
    [
        ([7, 7, 6, 7], 2),
        ([7, 7, 8, 7], 2),
        ([6, 7], 0),
        ([7, 6], 1),
        ([7, 7, 6, 6], 2),
        ([9, 8, 7, 6], 3),
        ([7, 7, 7, 7], None),
    ],
)
def test_the_rank_that_has_begun_another_number_of_collectives_is_named(begun: list[int], odd: int | None) -> None:
    found = odd_rank({}, {rank: position(count) for rank, count in enumerate(begun)})

    assert (None if found is None else found[0]) == odd
    if found is not None:
        assert f"it had begun {begun[found[0]]} collectives" in found[1]


def test_another_collective_tells_more_than_their_number() -> None:
    of_ranks = {rank: calls(11, 12) for rank in range(4)}
    of_ranks[1] = [*calls(11), *calls(12, what="gloo:broadcast [[9]]")]
    positions = {rank: position(12 if rank else 11) for rank in range(4)}

    assert odd_rank(of_ranks, positions) == (
        1,
        "its collective number 12 was gloo:broadcast [[9]], and that of the others gloo:all_reduce [[4]]",
    )


def test_the_first_mismatch_counts() -> None:
    of_ranks = {rank: calls(11, 12, 13) for rank in range(3)}
    of_ranks[2] = [*calls(11), *calls(12, 13, what="gloo:all_gather [[1]]")]
    of_ranks[0] = [*calls(11, 12), *calls(13, what="gloo:barrier []")]

    found = odd_rank(of_ranks, {rank: position(13) for rank in range(3)})

    assert found is not None
    assert found[0] == 2


def test_ranks_that_stand_at_the_same_place_share_its_lines() -> None:
    stack = ["  File train.py, line 3", "    loss.backward()"]

    text = others({0: stack, 1: stack, 3: ["  File other.py"]}, {0: position(4)}, 4)

    assert text.splitlines() == [
        "rank 0 of 4 (step 5, in training, epoch 0, batch 5) stood at:",
        "rank 1 of 4 stood at:",
        "[rank0][rank1]:   File train.py, line 3",
        "[rank0][rank1]:     loss.backward()",
        "rank 3 of 4 stood at:",
        "[rank3]:   File other.py",
    ]
    assert others({}, {}, 4) == ""


def test_the_last_collectives_are_one_line_a_rank() -> None:
    text = recent({0: calls(*range(1, 8)), 1: []}, 2)
    assert text.startswith("last collectives of rank 0 of 2: 3 gloo:all_reduce [[4]], 4 ")
    assert len(text.splitlines()) == 1


def failure(**options: object) -> Failure:
    given = {"exit_code": None, "trace": "", "is_consequence": False, **options}
    return Failure(rank=2, world_size=4, pid=4711, time_s=0.0, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "first_line"),
    [
        ({"trace": "LookupError: x"}, "rank 2 of 4 (process 4711) failed first; the run was ended. Its own report:"),
        (
            {"exit_code": -9, "position": position(3)},
            "rank 2 of 4 (process 4711) was killed by SIGKILL (signal 9) first, at step 5, in training, epoch 0, "
            "batch 5; the run was ended. Its own report:",
        ),
        (
            {"exit_code": 3, "position": position(3)},
            "rank 2 of 4 (process 4711) ended with exit code 3 first, at step 5, in training, epoch 0, batch 5; "
            "the run was ended. Its own report:",
        ),
        (
            {"trace": "  File train.py", "position": position(3), "kept_waiting": "it had begun 3 collectives"},
            "rank 2 of 4 (process 4711) kept the others waiting, at step 5, in training, epoch 0, batch 5: "
            "it had begun 3 collectives. The run was ended. There it stood:",
        ),
    ],
)
def test_a_report_begins_with_the_rank_its_end_and_its_step(options: dict[str, object], first_line: str) -> None:
    lines = str(failure(**options)).splitlines()

    assert lines[0] == first_line
    assert all(line.startswith("[rank2]: ") for line in lines[1:])
    assert len(lines) > 1
