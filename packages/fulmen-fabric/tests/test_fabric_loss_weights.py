"""``LossWeights`` in a loop of one's own: what it leaves in gradients, keeps, reads and refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fulmen_fabric import Fabric, LocalCollectives, LossWeights
from fulmen_protocols import MisconfigurationException, MisconfigurationRuntimeError


class Counting(LocalCollectives):
    """One process that counts what it would have said to others."""

    def __init__(self):
        self.said = []

    def all_reduce(self, tensor, op="mean"):
        self.said.append((op, tensor.item()))
        return super().all_reduce(tensor, op)


def linear(dtype=torch.float64, device="cpu"):
    torch.manual_seed(0)
    return nn.Linear(4, 3, dtype=dtype, device=device)


def sums(model, rows):
    return model(rows).square().sum()


def test_a_window_has_the_gradient_of_the_mean_of_all_its_sums():
    model, mean = linear(), linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = LossWeights()
    for sizes in ((3, 70, 1), (5,), (2, 2)):
        rows = [torch.randn(size, 4, dtype=torch.float64) for size in sizes]
        for each in rows:
            weights.add(sums(model, each), len(each)).backward()
        weights.scale_gradients(optimizer)
        everything = torch.cat(rows)
        (sums(mean, everything) / len(everything)).backward()
        for ours, theirs in zip(model.parameters(), mean.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-13, atol=1e-13)
        model.zero_grad()
        mean.zero_grad()


def test_a_step_costs_one_reduction_and_the_first_of_a_run_one_more():
    model, collectives = linear(), Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = LossWeights(collectives)
    for window in range(3):
        for size in (3, 4):
            rows = torch.randn(size, 4, dtype=torch.float64)
            weights.add(sums(model, rows), size, is_last=size == 4 and window > 0).backward()
        weights.scale_gradients(optimizer)
    assert collectives.said == [("max", 3.0), ("sum", 7.0), ("sum", 7.0), ("sum", 7.0)]


def test_backward_runs_on_a_loss_of_the_size_of_a_mean():
    model, weights = linear(), LossWeights()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for size in (1_000, 1_000_000, 1_000_000):
        loss = torch.tensor(2.0 * size, dtype=torch.float64, requires_grad=True) + sums(
            model, torch.ones(1, 4).double()
        )
        seen = weights.add(loss, size)
        weights.scale_gradients(optimizer)
    # A mean would be 2; the unit is a power of two, and follows the weights from one window to the next.
    assert 1.0 < seen.item() < 2.1


def test_nothing_is_read_by_the_host():
    """A meta tensor has no value: whoever reads one fails."""
    model = linear(torch.float32, "meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = LossWeights()
    for weight in (3, torch.tensor(4, device="meta"), 2.5, torch.tensor(0.0, device="meta")):
        weights.add(sums(model, torch.empty(2, 4, device="meta")), weight).backward()
        weights.scale_gradients(optimizer)
    with pytest.raises(RuntimeError, match="meta"):
        model.weight.grad.sum().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_rounded_once_and_their_factor_not_at_all(dtype):
    parameter = nn.Parameter(torch.zeros(1_000, dtype=dtype))
    gradient = torch.randn(1_000).to(dtype)
    weights = LossWeights()
    weights.note(1_020, torch.device("cpu"))
    parameter.grad = gradient.clone()
    weights.scale_gradients(torch.optim.SGD([parameter], lr=0.1))
    # The unit is 1024: a factor of 1024 / 1020, which is no number of either type.
    assert torch.equal(parameter.grad, (gradient.float() * (1_024 / 1_020)).to(dtype))
    assert not torch.equal(parameter.grad, gradient * torch.tensor(1_024 / 1_020, dtype=dtype))


def test_sparse_gradients_and_parameters_without_one_are_no_obstacle():
    torch.manual_seed(0)
    sparse, dense = (nn.Embedding(6, 2, sparse=each).double() for each in (True, False))
    dense.load_state_dict(sparse.state_dict())
    optimizer = torch.optim.SGD([*sparse.parameters(), nn.Parameter(torch.zeros(2))], lr=0.1)
    weights = LossWeights()
    for tokens in (torch.tensor([0, 1, 1]), torch.tensor([1, 4])):
        weights.add(sparse(tokens).square().sum(), len(tokens)).backward()
        (dense(tokens).square().sum() / 5).backward()
    weights.scale_gradients(optimizer)
    torch.testing.assert_close(sparse.weight.grad.to_dense(), dense.weight.grad)


def test_an_infinite_gradient_stays_one_for_a_scaler_to_find():
    model = linear()
    weights = LossWeights()
    weights.add(sums(model, torch.full((2, 4), float("inf"), dtype=torch.float64)), 2).backward()
    weights.scale_gradients(torch.optim.SGD(model.parameters(), lr=0.1))
    assert not model.weight.grad.isfinite().any()


def test_an_open_window_goes_on_from_its_state():
    rows = [torch.randn(size, 4, dtype=torch.float64) for size in (3, 90, 5)]
    first, second = linear(), linear()
    whole, part = LossWeights(), LossWeights()
    assert part.state_dict() == {}
    for each in rows[:2]:
        whole.add(sums(first, each), len(each)).backward()
        part.add(sums(second, each), len(each)).backward()
    resumed = LossWeights()
    resumed.load_state_dict(part.state_dict())
    whole.add(sums(first, rows[2]), 5).backward()
    resumed.add(sums(second, rows[2]), 5).backward()
    whole.scale_gradients(torch.optim.SGD(first.parameters(), lr=0.1))
    resumed.scale_gradients(torch.optim.SGD(second.parameters(), lr=0.1))
    assert torch.equal(first.weight.grad, second.weight.grad)
    assert {name: value.tolist() for name, value in resumed.state_dict().items()} == {"total": 0.0, "unit": 128.0}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_clipping_of_fabric_sees_the_gradient_of_the_mean(precision):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    alone, weights = linear(torch.float32), LossWeights()
    rows = [torch.randn(size, 4) for size in (300, 500)]
    for each in rows:
        fabric.backward(weights.add(sums(model, each) / 20, len(each)))
    weights.scale_gradients(optimizer)
    norm = fabric.clip_gradients(model, optimizer, max_norm=0.01)
    (sums(alone, torch.cat(rows)) / 20 / 800).backward()
    expected = torch.cat([each.grad.flatten() for each in alone.parameters()]).norm()
    torch.testing.assert_close(norm, expected, rtol=1e-5 if precision == "32-true" else 2e-2, atol=0)


def test_scaling_before_any_loss_is_an_error_that_says_what_is_missing():
    with pytest.raises(
        MisconfigurationRuntimeError, match=r"no loss went through add\(\): call backward on weights.add"
    ):
        LossWeights().scale_gradients(torch.optim.SGD(linear().parameters(), lr=0.1))


@pytest.mark.parametrize("weight", [-1, float("inf"), True, "3", torch.ones(2)])
def test_a_weight_that_is_no_number_of_things_is_refused(weight):
    with pytest.raises((MisconfigurationException, TypeError), match="the weight of a loss"):
        LossWeights().add(torch.ones((), requires_grad=True), weight)
