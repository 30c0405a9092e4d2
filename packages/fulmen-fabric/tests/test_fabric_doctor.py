"""What ``fulmen doctor`` finds wrong, and its command line. Real processes are in the integration tests."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from fulmen_fabric.doctor import _add_up, _Place, _wrong_places, command


class Two:
    """Two ranks, the other of which adds ``other`` to each sum."""

    rank, world_size = 0, 2

    def __init__(self, other: float) -> None:
        self.other = other

    def barrier(self, name: str = "") -> None: ...

    def all_reduce(self, tensor: torch.Tensor, op: str = "mean") -> torch.Tensor:
        assert op == "sum"
        total = tensor.clone()
        total[-1:] += self.other
        total[:-1] += 2.0
        return total


def test_a_right_sum_is_timed_and_a_wrong_one_is_told_with_what_it_was() -> None:
    right: Any = Two(2.0)
    false: Any = Two(3.0)
    lines, wrong = _add_up(right, torch.device("cpu"), 2)
    assert wrong == []
    assert "a sum over 2 ranks of one number is right" in lines[0]

    _, wrong = _add_up(false, torch.device("cpu"), 2)
    assert wrong == [
        "The sum of 1 to 2 over all ranks was 4 on rank 0.",
        "The sum of 1 to 2 over all ranks was between 3 and 4 on rank 0.",
    ]


def test_two_ranks_on_one_gpu_are_named_and_on_one_cpu_they_are_right() -> None:
    def place(rank: int, host: str, device: str) -> _Place:
        return _Place(rank, 0, rank, host, 100 + rank, device, 0.1)

    shared = [place(0, "a", "cuda:0"), place(1, "b", "cuda:0"), place(2, "a", "cuda:0")]
    assert _wrong_places(shared) == ["Ranks 0 and 2 share cuda:0 of a."]
    assert _wrong_places([place(0, "a", "cpu"), place(1, "a", "cpu")]) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--time-limit", "0"], "'0' is no time: give a positive number of seconds"),
        (["--strategy", "nonsense"], "no strategy is named 'nonsense'"),
        (["--devices", "0", "--accelerator", "cpu"], "devices"),
        (["--port", "1"], "--port"),
    ],
)
def test_a_wrong_command_line_is_said_before_anything_starts(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(words) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert not [one for one in threading.enumerate() if isinstance(one, threading.Timer) and not one.finished.is_set()]
