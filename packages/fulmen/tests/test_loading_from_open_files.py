"""``load_from_checkpoint`` takes an open file where a path would do: some libraries change a checkpoint in memory."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import fulmen
from fulmen.core import saving
from fulmen_protocols import CheckpointUnsafe

if TYPE_CHECKING:
    from pathlib import Path


class Net(fulmen.LightningModule):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, width)


class Data(fulmen.LightningDataModule):
    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()


def checkpoint(width: int = 3) -> dict[str, object]:
    return {
        "state_dict": {"layer.weight": torch.ones(width, width), "layer.bias": torch.zeros(width)},
        "hyper_parameters": {"width": width},
        "datamodule_hyper_parameters": {"size": 7},
        "pytorch-lightning_version": "2.6.0",
    }


@pytest.mark.proves("5.31")
@pytest.mark.parametrize("width", [3, 600], ids=["read", "mapped into memory"])
def test_a_module_and_a_datamodule_load_from_memory(width: int) -> None:
    buffer = io.BytesIO()
    torch.save(checkpoint(width), buffer)

    buffer.seek(0)
    module = Net.load_from_checkpoint(buffer)
    buffer.seek(0)
    datamodule = Data.load_from_checkpoint(buffer, weights_only=True)

    assert module.hparams.width == width
    assert torch.equal(module.layer.weight, torch.ones(width, width))
    assert datamodule.hparams.size == 7


@pytest.mark.proves("5.31")
def test_an_open_file_is_read_from_where_it_stands_and_stays_open(tmp_path: Path) -> None:
    torch.save(checkpoint(), tmp_path / "a.ckpt")
    (tmp_path / "b").write_bytes(b"head" + (tmp_path / "a.ckpt").read_bytes())

    with (tmp_path / "b").open("rb") as file:
        file.seek(4)
        assert Net.load_from_checkpoint(file, map_location="cpu").layer.weight.shape == (3, 3)
        assert not file.closed


@pytest.mark.proves("5.31")
def test_code_from_an_open_file_runs_only_if_it_is_asked_for() -> None:
    buffer = io.BytesIO()
    torch.save({**checkpoint(), "hyper_parameters": {"width": 3, "kind": nn.ReLU()}}, buffer)

    buffer.seek(0)
    with pytest.raises(CheckpointUnsafe, match="weights_only=False"):
        Net.load_from_checkpoint(buffer)
    buffer.seek(0)
    assert Net.load_from_checkpoint(buffer, weights_only=False).layer.weight.shape == (3, 3)


@pytest.mark.proves("5.31")
def test_a_class_that_overrides_the_loading_calls_it_by_lightnings_private_name(tmp_path: Path) -> None:
    class Own(Net):
        @classmethod
        def load_from_checkpoint(cls, checkpoint_path: Path, **kwargs: object) -> Own:  # type: ignore[override]  # as libraries do
            return saving._load_from_checkpoint(cls, checkpoint_path, "cpu", None, False, **kwargs)

    content = checkpoint()
    content["state_dict"] = {"layer.weight": torch.ones(3, 3)}
    torch.save(content, tmp_path / "a.ckpt")

    with pytest.warns(UserWarning, match=r"lacks \['layer.bias'\]"):
        loaded = Own.load_from_checkpoint(tmp_path / "a.ckpt")

    assert type(loaded) is Own
    assert torch.equal(loaded.layer.weight, torch.ones(3, 3))
    assert saving._load_from_checkpoint(Data, tmp_path / "a.ckpt", size=8).hparams.size == 8
