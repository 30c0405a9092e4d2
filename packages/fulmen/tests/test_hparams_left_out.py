"""Objects among the hyperparameters neither stop a run nor get into files that would run code."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.plugins import AsyncCheckpointIO, TorchCheckpointIO
from fulmen_protocols import CheckpointUnsafe

if TYPE_CHECKING:
    from pathlib import Path


@dataclasses.dataclass
class Config:
    width: int = 3


class Net(fulmen.LightningModule):
    """As templates for configured experiments write it: network and optimizer come from outside."""

    def __init__(self, net: nn.Module, optimizer: Any, config: Config, depth: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return self.hparams.optimizer(self.parameters())


def made() -> Net:
    with pytest.warns(UserWarning, match=r"'net' is an nn\.Module.*leave it out.*ignore=\['net'\]"):
        return Net(nn.Linear(2, 1), partial(torch.optim.SGD, lr=0.1), Config())


def fit(model: Net, folder: Path, *, epochs: int = 1, **options: Any) -> fulmen.Trainer:
    resume = options.pop("ckpt_path", None)
    trainer = fulmen.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2), ckpt_path=resume)
    return trainer


LEFT_OUT = r"leave out the hyperparameters 'optimizer' \(partial\), 'config' \(Config\) of Net.*optimizer=\.\.\."


@pytest.mark.proves("5.3", "10.20")
@pytest.mark.parametrize("plugins", [None, AsyncCheckpointIO()], ids=["plain", "asynchronous"])
def test_a_run_saves_without_them_resumes_and_says_so_at_its_start(tmp_path: Path, plugins: Any) -> None:
    model = made()
    with pytest.warns(UserWarning, match=LEFT_OUT):
        trainer = fit(model, tmp_path, plugins=plugins)
    assert trainer.checkpoint_callback is not None
    path = trainer.checkpoint_callback.best_model_path

    assert torch.load(path, weights_only=True)["hyper_parameters"] == {"depth": 2}
    assert model.hparams.config == Config(), "what the module itself reads is untouched"
    with pytest.warns(UserWarning, match=LEFT_OUT):
        again = fit(made(), tmp_path, epochs=2, ckpt_path=path)
    assert again.global_step == 4


@pytest.mark.proves("5.3", "5.31")
def test_loading_needs_them_again_and_says_which(tmp_path: Path) -> None:
    model = made()
    with pytest.warns(UserWarning, match=LEFT_OUT):
        trainer = fit(model, tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")

    with pytest.raises(TypeError) as caught:
        Net.load_from_checkpoint(tmp_path / "a.ckpt", net=nn.Linear(2, 1))
    assert "saved without optimizer, config" in " ".join(caught.value.__notes__)
    with pytest.warns(UserWarning, match="'net' is an nn.Module"):
        loaded = Net.load_from_checkpoint(tmp_path / "a.ckpt", net=nn.Linear(2, 1), optimizer=None, config=Config(9))
    assert (loaded.hparams.depth, loaded.hparams.config.width) == (2, 9)
    assert torch.equal(loaded.net.weight, model.net.weight)


@pytest.mark.proves("5.3")
def test_a_checkpoint_io_that_may_hold_them_does(tmp_path: Path) -> None:
    trainer = fit(made(), tmp_path, plugins=TorchCheckpointIO(allow_unsafe=True))
    trainer.save_checkpoint(tmp_path / "a.ckpt")

    saved = torch.load(tmp_path / "a.ckpt", weights_only=False)["hyper_parameters"]
    assert (saved["config"], saved["optimizer"].func) == (Config(), torch.optim.SGD)


@pytest.mark.proves("5.3", "5.31")
@pytest.mark.parametrize("plugins", [None, AsyncCheckpointIO()], ids=["plain", "asynchronous"])
def test_who_trusts_every_file_by_torchs_variable_gets_them_saved_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins: Any
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trainer = fit(made(), tmp_path, plugins=plugins)
    assert trainer.checkpoint_callback is not None
    path = trainer.checkpoint_callback.best_model_path

    assert torch.load(path, weights_only=False)["hyper_parameters"]["config"] == Config()
    with pytest.warns(UserWarning, match="'net' is an nn.Module"):
        assert Net.load_from_checkpoint(path).hparams.optimizer.func is torch.optim.SGD
    assert fit(made(), tmp_path, epochs=2, ckpt_path=path).global_step == 4
    with pytest.raises(CheckpointUnsafe, match="pass weights_only=False"):
        Net.load_from_checkpoint(path, weights_only=True)


@pytest.mark.proves("5.3")
def test_what_is_written_in_code_goes_before_torchs_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointUnsafe, match="allow_unsafe=True"):
        TorchCheckpointIO(allow_unsafe=False).save_checkpoint({"config": Config()}, tmp_path / "a.ckpt")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    assert not TorchCheckpointIO().allow_unsafe
