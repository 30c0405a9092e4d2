"""SIGTERM ends a run between two batches: every rank on the same step, with exit code 143."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import os, signal, sys, time, warnings
import torch, fulmen
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")

class Model(fulmen.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Asked(fulmen.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        time.sleep(0.01 * (1 + trainer.global_rank))  # ranks are apart when the signal comes
        if trainer.global_step == 5 and trainer.global_rank == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGTERM)
    def on_exception(self, trainer, pl_module, exception):
        open(f"{sys.argv[3]}/rank{trainer.global_rank}", "w").write(f"{trainer.global_step} {exception!r}")

if __name__ == "__main__":
    trainer = fulmen.Trainer(accelerator="cpu", devices=int(sys.argv[1]), max_epochs=50, log_every_n_steps=3,
        callbacks=[Asked()], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False)
    trainer.fit(Model(), DataLoader(torch.randn(40, 2), batch_size=2))
    sys.exit("not stopped")
"""


@pytest.mark.proves("9.51")
@pytest.mark.parametrize(("ranks", "asked"), [(1, 0), (2, 0), (2, 1)])
def test_all_ranks_stop_on_the_same_step_and_exit_with_143(ranks: int, asked: int, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    command = [sys.executable, str(script), str(ranks), str(asked), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)

    assert done.returncode == 143, done.stderr[-2000:]
    ends = [(tmp_path / f"rank{rank}").read_text() for rank in range(ranks)]
    assert len(set(ends)) == 1, ends
    step, exception = ends[0].split(" ", 1)
    assert exception.startswith("SIGTERMException")
    # One process stops after the batch in hand; several at the next row of the loggers that all can still reach.
    assert int(step) == 5 if ranks == 1 else 5 < int(step) <= 12


GOES_ON = (
    SCRIPT.partition("if __name__")[0]
    + """
import torch.distributed as dist

def run(callbacks, **options):
    trainer = fulmen.Trainer(accelerator="cpu", devices=2, strategy="ddp", log_every_n_steps=1, callbacks=callbacks,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options)
    trainer.fit(Model(), DataLoader(torch.randn(40, 2), batch_size=2))
    return trainer

dist.init_process_group("gloo")  # ours, so it outlives both trainers
try:
    run([Asked()], max_epochs=50)
except fulmen.exceptions.SIGTERMException:
    trainer = run([], max_steps=20)
    open(f"{sys.argv[3]}/second{trainer.global_rank}", "w").write(str(trainer.global_step))
dist.destroy_process_group()
"""
)


def test_a_later_trainer_of_the_same_processes_is_not_stopped_by_what_stopped_the_first(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(GOES_ON)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), "2", "0", str(tmp_path)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "test",
                "GROUP_RANK": "0",
                "OMP_NUM_THREADS": "1",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=90)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()

    assert [rank.returncode for rank in ranks] == [0, 0], errors
    assert [(tmp_path / f"second{rank}").read_text() for rank in range(2)] == ["20", "20"]
