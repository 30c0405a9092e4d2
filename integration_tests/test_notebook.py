"""Training in a real Jupyter kernel: what a person sees in the cells, with and without ipywidgets."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

manager = pytest.importorskip("jupyter_client.manager")
pytest.importorskip("ipykernel")

Cell = list[dict[str, Any]]

MODEL = """
import warnings
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import fulmen as L

warnings.simplefilter("ignore")

class Line(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.mse_loss(self.layer(batch[0]), batch[1]), prog_bar=True, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

x = torch.linspace(-1, 1, 64).unsqueeze(1)
loader = DataLoader(TensorDataset(x, 3 * x + 1), batch_size=4)
quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False)
model = Line()
"""


@pytest.fixture
def run_cell(tmp_path: Path) -> Iterator[Callable[[str], Cell]]:
    """Runs code in a kernel and gives the contents of its messages, each with its ``type``."""
    kernel = manager.KernelManager()
    kernel.kernel_spec.argv[0] = sys.executable
    kernel.start_kernel(cwd=str(tmp_path))
    client = kernel.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)

    def run(code: str) -> Cell:
        said: Cell = []
        client.execute_interactive(
            code,
            timeout=120,
            output_hook=lambda message: said.append({"type": message["msg_type"], **message["content"]}),
        )
        return said

    try:
        yield run
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


def text(cell: Cell) -> str:
    assert not [message for message in cell if message["type"] == "error"], cell
    return "".join(message["text"] for message in cell if message["type"] == "stream")


def widgets(cell: Cell) -> list[str]:
    """What is displayed as widgets, in words."""
    return [
        message["data"]["text/plain"]
        for message in cell
        if message["type"] == "display_data" and "application/vnd.jupyter.widget-view+json" in message["data"]
    ]


@pytest.mark.parametrize("bar", ["", ", callbacks=L.callbacks.RichProgressBar()"], ids=["default", "rich"])
def test_without_widgets_progress_is_text_and_nobody_is_told_to_install_them(
    run_cell: Callable[[str], Cell], bar: str
) -> None:
    run_cell("import sys; sys.modules['ipywidgets'] = None" + MODEL)
    cell = run_cell(f"L.Trainer(max_epochs=2, **quiet{bar}).fit(model, loader, loader)")

    said = text(cell)
    assert "Epoch 1/1" in said
    assert "16/16" in said
    assert "val_loss=" in said
    assert widgets(cell) == []
    assert "ipywidgets" not in str(cell)


def test_with_widgets_the_bars_are_widgets(run_cell: Callable[[str], Cell]) -> None:
    pytest.importorskip("ipywidgets")
    run_cell(MODEL)
    cell = run_cell("trainer = L.Trainer(max_epochs=2, **quiet); trainer.fit(model, loader, loader)")

    assert any(bar.startswith("Epoch") for bar in widgets(cell))
    assert "Epoch" not in text(cell)


def test_processes_forked_from_a_notebook_show_their_summary_and_progress(run_cell: Callable[[str], Cell]) -> None:
    run_cell(MODEL)
    cell = run_cell("""
trainer = L.Trainer(max_epochs=2, devices=2, strategy="ddp_notebook", **quiet)
trainer.fit(model, loader, loader)
print("steps", trainer.global_step, "in", trainer.world_size)
""")

    said = text(cell)
    assert "layer │ Linear" in said
    assert "Epoch 1/1" in said
    assert "steps 16 in 2" in said


def test_an_interrupted_cell_leaves_a_trainer_that_goes_on(run_cell: Callable[[str], Cell]) -> None:
    run_cell(MODEL)
    interrupted = run_cell("""
import os, signal
class Interrupted(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)

trainer = L.Trainer(max_epochs=1, callbacks=Interrupted(), **quiet)
trainer.fit(model, loader)
""")
    assert [message["ename"] for message in interrupted if message["type"] == "error"] == ["KeyboardInterrupt"]

    after = run_cell("print(trainer.interrupted); trainer.fit(model, loader); print('then', trainer.global_step)")
    assert "True" in text(after)
    assert "then 21" in text(after)  # the interrupted epoch begins anew: 5 steps and then its 16
