"""What a step through Fabric costs, counted: Python calls of ours. A microsecond shows here and in no timing."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter

import torch
from torch import nn

import fulmen_fabric
from fulmen_fabric import Fabric

OURS = os.path.dirname(fulmen_fabric.__file__)


def calls(step, times=20):
    """Python functions of ours that one step calls, by name."""
    found = Counter()

    def count(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            found[frame.f_code.co_qualname] += 1

    step()
    gc.collect()
    gc.disable()  # finalizers are not the step's
    sys.setprofile(count)
    try:
        for _ in range(times):
            step()
    finally:
        sys.setprofile(None)
        gc.enable()
    return {name: number / times for name, number in found.items()}


def test_a_default_step_calls_five_functions_of_ours():
    fabric = Fabric(accelerator="cpu", devices=1)
    net = nn.Linear(4, 1)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    x = torch.ones(8, 4)

    def step():
        optimizer.zero_grad()
        fabric.backward(model(x).sum())
        optimizer.step()

    found = calls(step)

    # zero_grad; backward and what it was composed of; step and what it was composed of. The forward pass adds none.
    assert sum(found.values()) == 5, found


def test_a_batch_of_a_loader_costs_one_move():
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(torch.ones(400, 4), batch_size=4))
    batches = iter(loader)
    next(batches)

    found = calls(lambda: next(batches), times=50)

    assert sum(found.values()) <= 4, found
