"""``fulmen fit|validate|test|predict`` in processes of their own, as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytestmark = pytest.mark.processes

MODULE = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from fulmen import LightningDataModule, LightningModule

class Net(LightningModule):
    def __init__(self, width: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)

    def step(self, batch, batch_idx):
        loss = self.layer(batch[0]).pow(2).mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    training_step = validation_step = test_step = step

    def predict_step(self, batch, batch_idx):
        return self.layer(batch[0])

class Data(LightningDataModule):
    def __init__(self, samples: int = 8):
        super().__init__()
        self.samples = samples

    def loader(self):
        return DataLoader(TensorDataset(torch.ones(self.samples, 3)), batch_size=2)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader
"""

CONFIG = {
    "seed_everything": 5,
    "trainer": {
        "max_epochs": 2,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs"}},
        "callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "loss", "patience": 9}}],
    },
    "model": {"class_path": "things.Net", "init_args": {"width": 3}},
    "data": {"class_path": "things.Data"},
    "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "things.py").write_text(MODULE)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def fulmen(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("fulmen")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    return subprocess.run(
        [str(script), *argv], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.proves("12.2", "12.3")
def test_fit_then_test_with_what_the_current_folder_holds(folder: Path) -> None:
    ran = fulmen(folder, "fit", "--config=config.yaml", "--trainer.max_epochs=3")
    assert ran.returncode == 0, ran.stderr

    (checkpoint,) = folder.rglob("*.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 12) or content["global_step"] == 12
    saved = yaml.safe_load((folder / "logs/lightning_logs/version_0/config.yaml").read_text())
    assert (saved["trainer"]["max_epochs"], saved["seed_everything"]) == (3, 5)
    assert saved["model"]["class_path"] == "things.Net"

    tested = fulmen(folder, "test", "-c", "config.yaml", f"--ckpt_path={checkpoint}")
    assert tested.returncode == 0, tested.stderr
    assert "loss" in tested.stdout


@pytest.mark.proves("12.2")
@pytest.mark.parametrize("subcommand", ["validate", "predict"])
def test_a_class_by_its_bare_name_from_an_imported_module(folder: Path, subcommand: str) -> None:
    quick = ("--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")

    ran = fulmen(folder, subcommand, "--import", "things", "--model=Net", "--data=Data", "--seed_everything=1", *quick)

    assert ran.returncode == 0, ran.stderr


@pytest.mark.proves("12.3")
def test_the_configuration_can_be_printed_and_used(folder: Path) -> None:
    printed = fulmen(folder, "fit", "--config=config.yaml", "--print_config")
    assert printed.returncode == 0, printed.stderr

    content = yaml.safe_load(printed.stdout)
    assert content["trainer"]["callbacks"][0]["class_path"] == "fulmen.callbacks.EarlyStopping"
    assert content["optimizer"]["class_path"] == "torch.optim.SGD"


@pytest.mark.proves("12.8")
@pytest.mark.timeout(180)
@pytest.mark.slow
def test_two_ranks_write_one_configuration_and_both_refuse_to_write_over_it(folder: Path) -> None:
    argv = ("fit", "--config=config.yaml", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.logger=false",
            "--trainer.enable_checkpointing=false", "--trainer.default_root_dir=out")  # fmt: skip

    ran = fulmen(folder, *argv)
    assert ran.returncode == 0, ran.stderr
    assert yaml.safe_load((folder / "out/config.yaml").read_text())["trainer"]["devices"] == "2"

    again = fulmen(folder, *argv)
    assert again.returncode != 0
    assert "out/config.yaml', the configuration of an earlier run" in again.stderr


@pytest.mark.parametrize(
    ("content", "argv", "expected"),
    [
        (None, ["--config=gone.yaml"], "--config='gone.yaml': there is no such file"),
        ("trainer: [", ["-c", "bad.yaml"], "--config='bad.yaml' is no YAML"),
        ("- 3\n", ["--config", "bad.yaml"], "--config='bad.yaml' holds [3], and no configuration"),
        ("trainr: {}\n", ["--config=bad.yaml"], "has the key 'trainr', which is not known. Did you mean 'trainer'?"),
        (
            "trainer: {max_epoch: 3}\n",
            ["--config=bad.yaml"],
            "has the key 'trainer.max_epoch', which is not known. Did you mean 'max_epochs'?",
        ),
        (None, ["--import=nothing_here"], "--import='nothing_here': there is no such module"),
    ],
)
def test_a_wrong_configuration_is_reported_before_torch_is_imported(
    folder: Path, content: str | None, argv: list[str], expected: str
) -> None:
    if content is not None:
        (folder / "bad.yaml").write_text(content)
    program = (
        "import sys; from fulmen_protocols.cli import main; status = main(sys.argv[1:]);"
        "print(status, 'torch' in sys.modules, 'jsonargparse' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, "fit", *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ran.stdout.strip() == "2 False False"
    assert ran.stderr.startswith("fulmen fit: ")
    assert expected in ran.stderr


def test_help_imports_no_torch(folder: Path) -> None:
    program = (
        "import sys; from fulmen_protocols.cli import main; main(['--help']); print(sorted({'torch', 'yaml', 'numpy', "
        "'jsonargparse'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)

    *text, loaded = ran.stdout.strip().splitlines()
    assert loaded == "[]"
    for command in ("fit", "validate", "test", "predict"):
        assert any(line.startswith(f"  {command} ") for line in text)


def test_what_the_trainer_refuses_is_one_line_and_what_a_run_raises_has_its_traceback(folder: Path) -> None:
    refused = fulmen(folder, "fit", "--config=config.yaml", "--trainer.max_epochs=-7")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert "max_epochs=-7" in refused.stderr

    (folder / "things.py").write_text(MODULE.replace("loss = self", "raise KeyError('mine')\n        loss = self"))
    failed = fulmen(folder, "fit", "--config=config.yaml")
    assert failed.returncode == 1
    assert "Traceback" in failed.stderr
    assert "KeyError: 'mine'" in failed.stderr


def test_a_missing_library_is_named_with_its_install(folder: Path) -> None:
    program = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'jsonargparse' else real(name, *rest)\n"
        "from fulmen_protocols.cli import main; sys.exit(main(['fit', '--model=things.Net']))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )

    assert ran.returncode == 1
    assert "pip install 'fulmen[cli]'" in ran.stderr
