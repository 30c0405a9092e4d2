"""What an optimizer knows of its parameters is where they are when training begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fulmen
from fulmen._preparation import bring_state


def where(optimizer: torch.optim.Optimizer) -> dict[str, str]:
    [state] = optimizer.state.values()
    return {name: value.device.type for name, value in state.items()}


@pytest.mark.proves("4.9")
@pytest.mark.parametrize("capturable", [False, True])
def test_state_from_before_goes_where_torch_would_load_it(capturable: bool) -> None:
    used = nn.Parameter(torch.ones(3))
    before = torch.optim.Adam([used])
    used.sum().backward()  # type: ignore[no-untyped-call]
    before.step()

    ours, torchs = (
        torch.optim.Adam([nn.Parameter(torch.ones(3, device="meta"))], capturable=capturable) for _ in range(2)
    )
    [parameter] = ours.param_groups[0]["params"]
    ours.state[parameter] = dict(before.state[used])
    bring_state(ours)
    torchs.load_state_dict({"state": before.state_dict()["state"], "param_groups": torchs.state_dict()["param_groups"]})

    assert where(ours) == where(torchs)
    assert where(ours) == {"step": "meta" if capturable else "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


@pytest.mark.cuda
@pytest.mark.proves("4.9")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_optimizer_that_its_user_keeps_trains_in_a_second_fit(fused: bool) -> None:
    class Model(fulmen.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)
            self.kept = torch.optim.Adam(self.parameters(), fused=fused)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> Any:
            return self.kept

    model = Model()
    for _ in range(2):
        fulmen.Trainer(
            accelerator="cuda", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(model, DataLoader(torch.ones(4, 2)))  # fmt: skip

    assert {float(state["step"]) for state in model.kept.state.values()} == {8.0}
