"""Helpers that ask other ranks, on two gloo processes started by the Trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.utils.data import DataLoader
import fulmen
from fulmen.utilities import grad_norm, is_shared_filesystem

FOLDER = Path(sys.argv[1])


class Model(fulmen.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_start(self):
        trainer = self.trainer
        own = FOLDER / f"rank-{trainer.global_rank}"
        own.mkdir()
        found = {
            "same folder": is_shared_filesystem(trainer.strategy, FOLDER),
            "file in it": is_shared_filesystem(trainer.strategy, __file__),
            "own folder": is_shared_filesystem(trainer.strategy, own),
        }
        try:
            is_shared_filesystem(trainer.strategy, FOLDER / "absent")
        except ValueError as error:
            found["absent"] = str(error)

        mesh = init_device_mesh("cpu", (2,))
        sharded = nn.Linear(3, 4)
        plain = torch.arange(12.0).reshape(4, 3)
        sharded.weight = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Shard(0)]))
        sharded.bias = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
        sharded.weight.grad = distribute_tensor(plain, mesh, [Shard(0)])
        sharded.bias.grad = distribute_tensor(torch.ones(4), mesh, [Replicate()])
        found["norms"] = {name: norm.item() for name, norm in grad_norm(sharded, 2).items()}
        (FOLDER / f"found-{trainer.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = fulmen.Trainer(
        accelerator="cpu", strategy="ddp", devices=2, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    run.fit(Model(), DataLoader(torch.randn(4, 2), batch_size=2))
"""


@pytest.mark.proves("4.46", "13.14")
@pytest.mark.slow
def test_ranks_find_out_whether_they_share_files_and_what_the_norm_of_sharded_gradients_is(tmp_path: Path) -> None:
    script, folder = tmp_path / "script.py", tmp_path / "shared"
    script.write_text(SCRIPT)
    folder.mkdir()
    command = [sys.executable, str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    for rank in range(2):
        found = json.loads((folder / f"found-{rank}.json").read_text())
        assert (found["same folder"], found["file in it"], found["own folder"]) == (True, True, False)
        assert "absent" in found["absent"]
        assert "does not exist on every process" in found["absent"]
        squares = sum(i * i for i in range(12))
        assert found["norms"]["grad_2.0_norm/weight"] == pytest.approx(squares**0.5)
        assert found["norms"]["grad_2.0_norm/bias"] == pytest.approx(2)
        assert found["norms"]["grad_2.0_norm_total"] == pytest.approx((squares + 4) ** 0.5)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")], "the mark is taken away"
