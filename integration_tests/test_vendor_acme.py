"""A real distribution that is not ours: built, installed, found by entry point, conforming, and training by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

VENDOR = Path(__file__).parent / "vendor_acme"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip has installed acme-fulmen from its own wheel."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(wheels), str(VENDOR)]
    subprocess.run(build, check=True, timeout=180)
    (wheel,) = wheels.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, timeout=180)
    return target


def run(installed: Path, *arguments: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        cwd=cwd or installed,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_vendor_s_source_is_small_and_imports_nothing_of_ours() -> None:
    sources = {path.name: path.read_text() for path in (VENDOR / "src").rglob("*.py")}

    assert sum(len(source.splitlines()) for source in sources.values()) <= 100
    for name, source in sources.items():
        assert not re.search(r"^\s*(import|from)\s+fulmen", source, re.MULTILINE), name


def test_it_is_found_by_name_without_a_line_of_ours_that_knows_it(installed: Path) -> None:
    code = """
    from fulmen_protocols import LOGGERS, STRATEGIES, available, load
    print(available(STRATEGIES).count("acme"), available(LOGGERS).count("acme"))
    print(load(STRATEGIES, "acme", board=3).board, load(LOGGERS, "acme").name)
    """

    assert run(installed, "-c", textwrap.dedent(code)).split() == ["1", "1", "3", "acme"]


def test_fulmen_plugins_says_where_it_comes_from(installed: Path) -> None:
    out = run(
        installed, "-c", "import sys; from fulmen_protocols.cli import main; sys.exit(main(['plugins', '--json']))"
    )

    rows = [row for row in json.loads(out) if row["distribution"] == "acme-fulmen"]
    assert [(row["seam"], row["name"], row["version"], row["object_path"], row["usable"]) for row in rows] == [
        ("strategy", "acme", "0.3.0", "acme_fulmen.strategy:AcmeStrategy", True),
        ("logger", "acme", "0.3.0", "acme_fulmen.logger:AcmeLogger", True),
    ]


def test_it_passes_the_conformance_kits(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "test_acme.py").write_text((VENDOR / "conformance.py").read_text())
    pytest_ = (
        "-m",
        "pytest",
        "-q",
        "-W",
        "error",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        "test_acme.py",
    )

    out = run(installed, *pytest_, cwd=tmp_path)

    assert re.search(r"^\d\d passed, \d+ skipped", out, re.MULTILINE), out


SCRIPT = """
import copy, torch, fulmen
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

class Net(fulmen.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)

if __name__ == "__main__":
    torch.manual_seed(0)
    ours = Net()
    theirs = copy.deepcopy(ours.net)
    loader = DataLoader(TensorDataset(torch.randn(24, 4), torch.randn(24, 2)), batch_size=6)

    trainer = fulmen.Trainer(
        strategy=STRATEGY, accelerator="cpu", devices=1, max_epochs=3, logger=LOGGER, log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(ours, loader)

    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.05)
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            F.mse_loss(theirs(x), y).backward()
            optimizer.step()
    for got, expected in zip(ours.net.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(got, expected), "not one bit may differ"
    print("trained", trainer.global_step)
"""


@pytest.mark.parametrize("strategy", ["'acme'", pytest.param("AcmeStrategy(board=1)", marks=pytest.mark.slow)])
def test_the_trainer_trains_with_it_bit_for_bit_as_plain_pytorch_does(
    installed: Path, tmp_path: Path, strategy: str
) -> None:
    script = tmp_path / "train.py"
    source = SCRIPT.replace("STRATEGY", strategy).replace("LOGGER", "False")
    script.write_text("from acme_fulmen.strategy import AcmeStrategy\n" + source)

    out = run(installed, str(script), cwd=tmp_path)

    assert out.splitlines()[-1] == "trained 12"


def test_the_trainer_logs_with_its_logger(installed: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    source = SCRIPT.replace("STRATEGY", "'acme'").replace("LOGGER", "AcmeLogger('logs')")
    script.write_text("from acme_fulmen.logger import AcmeLogger\n" + source)

    run(installed, str(script), cwd=tmp_path)

    rows = [json.loads(line) for line in (tmp_path / "logs" / "acme" / "metrics.jsonl").read_text().splitlines()]
    losses = [(row["step"], row["metrics"]["loss"]) for row in rows if "loss" in row["metrics"]]
    assert [step for step, _ in losses] == list(range(12))
    assert losses[-1][1] < losses[0][1]


def test_an_unknown_strategy_is_answered_with_the_vendor_s_name(installed: Path) -> None:
    code = """
    import fulmen
    try:
        fulmen.Trainer(strategy="acmee", accelerator="cpu")
    except Exception as error:
        print(error)
    """

    assert "Did you mean 'acme'?" in run(installed, "-c", textwrap.dedent(code))
