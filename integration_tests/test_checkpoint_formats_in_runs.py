"""Runs that save in each format, go on from Lightning's checkpoints, or are given the wrong ones."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fulmen as L
from fulmen.callbacks import ModelCheckpoint
from fulmen.plugins import SafetensorsCheckpointIO, ShardedCheckpointIO, TorchCheckpointIO
from fulmen_checkpoint import FsspecStorage, convert
from fulmen_protocols import CHECKPOINT_IOS, CheckpointCorrupt, CheckpointError, CheckpointNotFound, load

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
IOS = {"torch": TorchCheckpointIO, "sharded": ShardedCheckpointIO, "safetensors": SafetensorsCheckpointIO}


def train(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "checkpoint_continuation_runner.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.proves("5.1", "5.36")
def test_training_goes_on_from_a_checkpoint_of_lightning_with_the_losses_that_lightning_has(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    train("lightning.pytorch", 2, tmp_path / "theirs.ckpt")
    theirs = train("lightning.pytorch", 4, tmp_path / "theirs-end.ckpt", tmp_path / "theirs.ckpt")
    ours = train("fulmen", 4, tmp_path / "ours-end.ckpt", tmp_path / "theirs.ckpt")
    assert ours == theirs
    assert len(ours["losses"]) == 10
    left, right = (torch.load(tmp_path / f"{name}-end.ckpt", weights_only=True) for name in ("ours", "theirs"))
    assert left["hyper_parameters"] == right["hyper_parameters"]
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert _flat(left[part]) == _flat(right[part]), part


def _flat(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _flat(item) for key, item in value.items()}
    return [_flat(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.proves("5.1")
@pytest.mark.slow
def test_lightning_goes_on_from_a_checkpoint_of_ours_in_any_format_once_it_is_converted(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    train("fulmen", 2, tmp_path / "ours.ckpt")
    convert(tmp_path / "ours.ckpt", tmp_path / "folder", "sharded")
    convert(tmp_path / "folder", tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "back.ckpt")
    theirs = train("lightning.pytorch", 4, tmp_path / "theirs-end.ckpt", tmp_path / "back.ckpt")
    ours = train("fulmen", 4, tmp_path / "ours-end.ckpt", tmp_path / "folder")
    assert ours == theirs


class Net(L.LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(4, width)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def loader() -> Any:
    return DataLoader(TensorDataset(torch.arange(32.0).reshape(8, 4)), batch_size=2)


def trainer(**options: Any) -> L.Trainer:
    defaults = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    return L.Trainer(**{**defaults, "enable_checkpointing": False, "enable_model_summary": False, **options})


@pytest.mark.parametrize("name", list(IOS))
def test_a_run_with_each_format_as_plugin_resumes_as_if_it_had_never_stopped(tmp_path: Path, name: str) -> None:
    assert type(load(CHECKPOINT_IOS, name)) is IOS[name]
    torch.manual_seed(0)
    whole = Net()
    trainer(max_epochs=4).fit(whole, loader())
    torch.manual_seed(0)
    first = trainer(max_epochs=2, plugins=[IOS[name]()])
    first.fit(Net(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    assert (tmp_path / "half.ckpt").is_dir() == (name == "sharded")
    second = Net()
    trainer(max_epochs=4, plugins=[IOS[name]()]).fit(second, loader(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert torch.equal(second.layer.weight, whole.layer.weight)
    assert torch.equal(Net.load_from_checkpoint(tmp_path / "half.ckpt").layer.bias, first.lightning_module.layer.bias)


@pytest.mark.parametrize("name", list(IOS))
def test_fabric_saves_and_loads_each_format(tmp_path: Path, name: str) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=[IOS[name]()])
    module = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(module.parameters())
    wrapped, optimizer = fabric.setup(module, optimizer)
    fabric.save(tmp_path / "a", {"model": wrapped, "optimizer": optimizer, "step": 7})
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.zero_()
    state = {"model": wrapped, "optimizer": optimizer, "step": 0}
    fabric.load(tmp_path / "a", state)
    assert torch.equal(module.weight, before)
    assert state["step"] == 7


def test_model_checkpoint_keeps_and_deletes_folders_like_files(tmp_path: Path) -> None:
    keeper = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_last=True)
    run = trainer(max_epochs=2, enable_checkpointing=True, callbacks=[keeper], plugins=[ShardedCheckpointIO()])
    run.fit(Net(), loader())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=1-step=8.ckpt", "last.ckpt"]
    for path in tmp_path.iterdir():
        ShardedCheckpointIO().verify_checkpoint(path)


def test_the_checkpoint_of_another_model_is_one_clear_error(tmp_path: Path) -> None:
    first = trainer(max_epochs=1)
    first.fit(Net(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(
        CheckpointError, match=r"(?s)the weights of '.*a\.ckpt' do not fit Net: .*size mismatch.*Give the"
    ):
        trainer(max_epochs=2).fit(Net(width=5), loader(), ckpt_path=str(tmp_path / "a.ckpt"))


def test_missing_truncated_foreign_and_newer_checkpoints_are_each_named(tmp_path: Path) -> None:
    first = trainer(max_epochs=1)
    first.fit(Net(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "short.ckpt").write_bytes(whole[:-100])
    (tmp_path / "foreign.ckpt").write_bytes(b"PNG or whatever" * 100)
    newer = torch.load(tmp_path / "a.ckpt", weights_only=True)
    newer["fulmen"]["version"] = 99
    torch.save(newer, tmp_path / "newer.ckpt")
    for name, kind, told in (
        ("missing", CheckpointNotFound, r"there is no checkpoint at '.*missing\.ckpt'\..*Check the path"),
        ("short", CheckpointCorrupt, r"'.*short\.ckpt' is damaged: .*Use an earlier checkpoint"),
        ("foreign", CheckpointCorrupt, r"'.*foreign\.ckpt' is damaged: .*Use an earlier checkpoint"),
        ("newer", CheckpointError, r"newer\.ckpt.* was written with layout 99; this fulmen reads 1\. Update fulmen"),
    ):
        with pytest.raises(kind, match=told):
            trainer(max_epochs=2).fit(Net(), loader(), ckpt_path=str(tmp_path / f"{name}.ckpt"))


class Rising(Net):
    """With a value that is better after each epoch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("loss", float(self.current_epoch), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


class _Disk(FsspecStorage):
    """Has no room left from some file on."""

    def __init__(self, files: int) -> None:
        super().__init__()
        self.files = files

    @contextmanager
    def write_atomic(self, path: str) -> Iterator[Any]:
        self.files -= 1
        with super().write_atomic(path) as stream:
            if self.files < 0:
                stream.write(b"the beginning")
                raise OSError(errno.ENOSPC, "No space left on device", path)
            yield stream


@pytest.mark.filterwarnings("ignore:the checkpoint holds the state of callbacks")
@pytest.mark.parametrize("monitor", [None, "loss"])
def test_a_disk_that_fills_up_ends_a_run_with_one_error_and_its_last_good_checkpoint(
    tmp_path: Path, monitor: str | None
) -> None:
    keep = ModelCheckpoint(tmp_path / "c", monitor=monitor, save_top_k=1, mode="max")
    full = TorchCheckpointIO(_Disk(files=2))
    with pytest.raises(CheckpointError, match=r"'.*epoch=2.*' cannot be written: OSError: .*No space left.*free space"):
        trainer(max_epochs=5, callbacks=[keep], enable_checkpointing=True, plugins=[full]).fit(Rising(), loader())

    (left,) = (tmp_path / "c").iterdir()
    assert left.name.startswith("epoch=1-")
    assert keep.best_model_path == str(left), "a failed save changes no ranking"
    TorchCheckpointIO().verify_checkpoint(left)
    resumed = trainer(max_epochs=5)
    resumed.fit(Rising(), loader(), ckpt_path=str(left))
    straight = Rising()
    trainer(max_epochs=5).fit(straight, loader())
    assert resumed.lightning_module is not None
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.lightning_module.state_dict()[name], value)


_DDP = """
import sys, torch, warnings
sys.path.insert(0, sys.argv[1])
import fulmen as L
from fulmen.plugins import ShardedCheckpointIO
from test_checkpoint_formats_in_runs import Net, loader, trainer
if __name__ == "__main__":
    torch.manual_seed(0)
    devices = int(sys.argv[2])
    run = trainer(max_epochs=int(sys.argv[4]), devices=devices, strategy="ddp" if devices > 1 else "auto",
                  plugins=[ShardedCheckpointIO()])
    run.fit(Net(), loader(), ckpt_path=sys.argv[5] if len(sys.argv) > 5 else None)
    run.save_checkpoint(sys.argv[3])
"""


@pytest.mark.slow
def test_ranks_of_ddp_each_write_a_part_and_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(_DDP)

    def run(*arguments: object) -> None:
        command = [sys.executable, "-W", "ignore", str(script), str(HERE), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    run(2, tmp_path / "two", 1)
    manifest = json.loads((tmp_path / "two" / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    assert sum(name.startswith("__") for name in manifest["files"]) == 2
    run(1, tmp_path / "one", 2, tmp_path / "two")
    found = TorchCheckpointIO().load_checkpoint(tmp_path / "one")
    assert found["epoch"] == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random states of another number of ranks are not restored
        again = trainer(max_epochs=2)
        again.fit(Net(), loader(), ckpt_path=str(tmp_path / "two"))
    assert torch.equal(again.lightning_module.layer.weight, found["state_dict"]["layer.weight"])  # type: ignore[index]  # known to be there
