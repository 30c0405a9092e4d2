"""What the ranks of an uneven run owe each other, with one process standing in for all but one of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from fulmen._preparation import give_back_batch_norms, synchronise_batch_norms
from fulmen._uneven import rounds_for, samples_of
from fulmen_fabric import LocalCollectives, UnevenRounds
from fulmen_protocols import MisconfigurationException


class Beside:
    """This process is rank 0 of two; what rank 1 sends is known beforehand."""

    rank, world_size = 0, 2

    def __init__(self, *of_rank_1: list[int]) -> None:
        self.of_rank_1 = list(of_rank_1)

    def all_gather(self, tensor: Tensor, *, differentiable: bool = False) -> Tensor:
        return torch.stack([tensor, torch.tensor(self.of_rank_1.pop(0))])


def test_a_loss_weighs_as_many_samples_as_its_batch_has() -> None:
    # Counts of rank 1, and whether it needs a batch: 4 samples, 2 samples, none left, none left.
    rounds = UnevenRounds(Beside([4, 0], [2, 0], [-1, 0], [-1, 0]))  # type: ignore[arg-type]  # a stand-in
    batches = [torch.ones(2, 3), torch.ones(6, 3), torch.ones(5, 3)]

    one = torch.tensor(1.0, dtype=torch.float64)
    weights = [(rounds.weigh(one).item(), is_last) for _, is_last in rounds.over(batches)]

    assert weights == [(2 * 2 / 6, False), (2 * 6 / 8, False), (2.0, True)]
    assert rounds.weight is None
    assert rounds.weigh(torch.tensor(3.0)).item() == 3.0, "outside of rounds nothing is weighed"


def test_equal_batches_weigh_exactly_one() -> None:
    rounds = UnevenRounds(Beside([7, 0], [-1, 0]))  # type: ignore[arg-type]  # a stand-in
    assert [rounds.weight for _ in rounds.over([torch.ones(7)])] == [1.0]


def test_a_rank_that_is_through_borrows_its_last_batch_at_no_weight() -> None:
    rounds = UnevenRounds(Beside([1, 0], [3, 0], [-1, 0]))  # type: ignore[arg-type]  # a stand-in
    seen = [
        (batch, is_last, rounds.weight, rounds.is_borrowed, rounds.taken)
        for batch, is_last in rounds.over([torch.ones(1)])
    ]
    assert [entry[1:] for entry in seen] == [(False, 1.0, False, 1), (True, 0.0, True, 1)]
    assert seen[1][0] is seen[0][0]


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_no_round_is_refused(window: int) -> None:
    with pytest.raises(MisconfigurationException, match=f"UnevenRounds got window={window}: it counts rounds"):
        UnevenRounds(LocalCollectives(), window=window)


def test_one_process_has_no_rounds() -> None:
    assert rounds_for(LocalCollectives(), 1) is None


def test_the_samples_of_a_loader_are_known_where_its_sampler_knows_them() -> None:
    data: Any = torch.ones(10)
    assert samples_of(DataLoader(data, batch_size=4), 3) == 10
    assert samples_of(DataLoader(data, batch_size=4), 2) == 8
    assert samples_of(DataLoader(data, batch_size=4, drop_last=True), 2) == 8
    assert samples_of([1, 2], 2) is None

    class Own(BatchSampler):
        pass

    assert samples_of(DataLoader(data, batch_sampler=Own(SequentialSampler(data), 4, False)), 3) is None


@pytest.mark.proves("4.48")
def test_batch_norm_is_converted_with_its_values_and_given_back_with_what_it_learned() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3)))
    own = [model[1], model[2][0]]  # type: ignore[index]  # known to be there
    weights = [layer.weight for layer in own]

    replaced = synchronise_batch_norms(model)

    assert list(replaced) == ["1", "2.0"]
    assert [type(layer) for layer in (model[1], model[2][0])] == [nn.SyncBatchNorm] * 2  # type: ignore[index]  # known to be there
    assert model[1].weight is weights[0], "an optimizer keeps its parameters"
    with torch.no_grad():
        model[1].running_mean.fill_(5.0)  # type: ignore[operator, union-attr]  # known to be there
        model[2][0].weight.fill_(7.0)  # type: ignore[index]  # known to be there

    give_back_batch_norms(model, replaced)

    assert [model[1], model[2][0]] == own  # type: ignore[index]  # known to be there
    assert own[0].running_mean.tolist() == [5.0] * 3
    assert own[1].weight.tolist() == [7.0] * 3
    assert model[1].weight is weights[0]
