"""ReplicaCheck: ranks that part are noticed, on three gloo processes; what has parted is named, and on whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from torch.utils.data import DataLoader

import fulmen
from fulmen.callbacks import ReplicaCheck
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from pathlib import Path

RANKS = 3
SCRIPT = """
import json, sys, warnings
import torch
from torch.utils.data import DataLoader
from fulmen import LightningModule, Trainer
from fulmen.callbacks import Callback, ReplicaCheck, ReplicasDriftedError

torch.set_num_threads(1)
FOLDER, RANKS = sys.argv[1], int(sys.argv[2])
BY = 2.0**-20


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)
        self.last.bias.requires_grad_(False).zero_()  # nobody trains it: what one rank adds stays there
    def training_step(self, batch, batch_idx):
        return self.last(self.first(batch)).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Meddles(Callback):
    def __init__(self, rank, step):
        self.rank, self.step = rank, step
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            with torch.no_grad():
                pl_module.last.bias += BY


def run(check, model=None, meddles=(), steps=20, strategy="ddp"):
    trainer = Trainer(
        accelerator="cpu", devices=RANKS, strategy=strategy, max_steps=steps, callbacks=[*meddles, check],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, logger=False,
    )
    data = DataLoader(torch.randn(200, 2, generator=torch.Generator().manual_seed(0)), batch_size=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(model or Model(), data)
            error = ""
        except ReplicasDriftedError as found:
            error = str(found)
    said = [str(each.message) for each in caught if "same model" in str(each.message)]
    return {"error": error, "said": said, "step": trainer.global_step, "drifted": check.drifted}


def main():
    found = {"sound": run(ReplicaCheck(every_n_steps=4), steps=10)}
    found["drift"] = run(ReplicaCheck(every_n_steps=4), meddles=[Meddles(RANKS - 1, 9)])
    found["end"] = run(ReplicaCheck(every_n_steps=1000), meddles=[Meddles(RANKS - 1, 3)], steps=6)
    found["warn"] = run(ReplicaCheck(every_n_steps=4, action="warn"), meddles=[Meddles(RANKS - 1, 9)])
    class Apart(Model):
        _ddp_params_and_buffers_to_ignore = ["last.bias"]
    found["ignored"] = run(ReplicaCheck(every_n_steps=4), Apart(), [Meddles(RANKS - 1, 3)], steps=6)
    try:
        run(ReplicaCheck(), strategy="fsdp")
    except ValueError as error:
        found["sharded"] = str(error)
    trainer = Trainer(accelerator="cpu", devices=RANKS, logger=False, enable_checkpointing=False)
    trainer.world.start()
    with open(f"{FOLDER}/rank{trainer.global_rank}.json", "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, folder, str(RANKS)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.processes
def test_ranks_that_stay_equal_train_to_the_end(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["sound"] == {"error": "", "said": [], "step": 10, "drifted": []}


@pytest.mark.processes
def test_a_parameter_that_parts_ends_all_ranks_at_the_next_comparison_with_its_name(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        found = rank["drift"]
        assert found["step"] == 12, "changed before step 10, compared after 4, 8 and 12"
        assert found["drifted"] == ["last.bias"]
        assert "one of 4 parameters differ: 'last.bias'" in found["error"]
        assert f"rank {len(ranks) - 1} has other values than rank 0, by up to {2.0**-20:.3g}" in found["error"]
        assert "after step 8" in found["error"]


@pytest.mark.processes
def test_the_last_steps_are_compared_when_training_ends(ranks: list[dict[str, Any]]) -> None:
    assert all("'last.bias'" in rank["end"]["error"] and rank["end"]["step"] == 6 for rank in ranks)


@pytest.mark.processes
def test_a_warning_comes_once_from_rank_zero_and_training_goes_on(ranks: list[dict[str, Any]]) -> None:
    assert [len(rank["warn"]["said"]) for rank in ranks] == [1] + [0] * (len(ranks) - 1)
    assert all(rank["warn"]["step"] == 20 and not rank["warn"]["error"] for rank in ranks)


@pytest.mark.processes
def test_what_ddp_was_told_to_leave_alone_may_differ(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["ignored"]["error"] == "" and rank["ignored"]["step"] == 6 for rank in ranks)


@pytest.mark.processes
def test_a_strategy_that_keeps_no_copies_is_refused_by_name(ranks: list[dict[str, Any]]) -> None:
    assert all("strategy='fsdp'" in rank["sharded"] and "use 'ddp'" in rank["sharded"] for rank in ranks)


def test_one_process_has_nothing_to_compare() -> None:
    class Model(fulmen.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    check = ReplicaCheck(every_n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fulmen.Trainer(
            accelerator="cpu", devices=1, max_steps=3, callbacks=[check], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(Model(), DataLoader(torch.ones(8, 2), 2))  # fmt: skip
    assert check.drifted == []


def test_arguments_that_cannot_be_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"ReplicaCheck\(every_n_steps=0\) must be at least 1"):
        ReplicaCheck(every_n_steps=0)
    with pytest.raises(MisconfigurationException, match=r"action='rise'.*'raise' nor 'warn'.*Did you mean 'raise'\?"):
        ReplicaCheck(action=cast("Any", "rise"))
