"""On a CUDA device: the generator of the device is in a checkpoint, and a resumed run ends bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import Callback
from fulmen.plugins import AsyncCheckpointIO, TorchCheckpointIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Model(fulmen.LightningModule):
    """Drops out on the device, and draws a number there and on the CPU at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.4), nn.ReLU(), nn.Linear(64, 3))
        self.drawn: list[tuple[float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert self.device.type == "cuda"
        self.drawn.append((float(torch.rand((), device=self.device)), float(torch.rand(()))))
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Saves(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[Path] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.paths.append(self.folder / f"{len(self.paths)}.ckpt")
        trainer.save_checkpoint(self.paths[-1])


def fit(io: Any, callbacks: list[Any], resume: Path | None = None, **options: Any) -> Model:
    torch.manual_seed(3 if resume is None else 99)
    trainer = fulmen.Trainer(
        accelerator="cuda",
        devices=1,
        max_epochs=2,
        callbacks=callbacks,
        plugins=[io],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(24, 8, generator=generator), torch.randint(0, 3, (24,), generator=generator))
    model = Model()
    trainer.fit(model, DataLoader(data, 4, shuffle=True), ckpt_path=resume)
    return model


@pytest.mark.proves("5.39")
@pytest.mark.parametrize("io", [TorchCheckpointIO, AsyncCheckpointIO])
@pytest.mark.parametrize("options", [{}, {"precision": "16-mixed", "accumulate_grad_batches": 3}], ids=["32", "scaler"])
def test_a_run_on_a_device_resumes_with_the_devices_random_numbers_bit_for_bit(
    io: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    saves = Saves(tmp_path)
    whole = fit(io(), [saves], **options)
    assert len(saves.paths) == len(whole.drawn) == 12
    assert len({device for device, _ in whole.drawn}) == 12
    for done in (1, 5, 6, 9):
        state = torch.load(saves.paths[done - 1], weights_only=True)["fulmen"]["ranks"][0]["rng"]
        assert set(state["device"]) == {"cuda"}
        resumed = fit(io(), [], saves.paths[done - 1], **options)
        assert resumed.drawn == whole.drawn[done:], f"saved after batch {done}"
        for got, want in zip(resumed.parameters(), whole.parameters(), strict=True):
            assert torch.equal(got, want), f"saved after batch {done}"
