"""What a reader and a debugger meet: short stacks, one readable loop, every run explained, idle hooks for free."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fulmen
import fulmen.fit


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.frames: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.frames = [frame.filename for frame in traceback.extract_stack()]
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options: Any) -> fulmen.Trainer:
    return fulmen.Trainer(**{"accelerator": "cpu", "max_epochs": 1, "barebones": True, **options})


def loader() -> DataLoader[Any]:
    return DataLoader(torch.randn(4, 2), batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def test_at_most_six_frames_of_ours_lie_between_fit_and_the_step() -> None:
    model = Model()
    trainer().fit(model, loader())

    ours = [name for name in model.frames if f"{Path('src') / 'fulmen'}" in name]

    assert 0 < len(ours) <= 6, ours


def test_the_training_loop_is_one_file_under_200_lines_that_knows_no_names_ranks_or_files() -> None:
    source = inspect.getsource(fulmen.fit)

    assert len(source.splitlines()) < 200
    for word in ("isinstance", "getattr", ".item()", "import torch", "rank_zero", "open(", "self."):
        assert word not in source, word


def test_the_loops_do_not_import_the_trainer() -> None:
    code = (
        "import sys, fulmen.fit, fulmen.evaluate, fulmen.predict, fulmen.manual, fulmen_fabric.steps; "
        "sys.exit('fulmen.trainer' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_explain_prints_the_order_of_a_run_and_who_supplies_each_part(capsys: Any) -> None:
    class Watching(fulmen.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            pass

    text = trainer(callbacks=[Watching()], gradient_clip_val=0.5, accumulate_grad_batches=2).explain(Model())

    assert capsys.readouterr().out.strip() == text.strip()
    assert "single_device from fulmen-strategies" in text
    assert "32-true from fulmen-precision" in text
    assert "on_train_batch_end  <- Watching" in text
    assert "gradients are clipped (norm, 0.5)" in text
    order = [
        "setup",
        "configure_optimizers",
        "on_fit_start",
        "on_train_start",
        "training_step",
        "backward",
        "on_before_optimizer_step",
        "optimizer step",
        "on_train_batch_end",
        "on_train_epoch_end",
        "teardown",
    ]
    places = [text.index(f" {word}") for word in order]
    assert places == sorted(places)


def test_importing_fulmen_imports_no_library_that_a_script_did_not_ask_for() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fulmen; fulmen.Trainer; fulmen.LightningModule; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new & {'rich', 'tqdm', 'tensorboardX', 'torchmetrics', 'numpy', 'fsspec', 'yaml', 'psutil'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert found.strip() == "[]"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_assembling_a_trainer_for_one_process_imports_nothing_of_sharding_or_compiling(precision: str) -> None:
    code = (
        "import sys, fulmen; "
        f"fulmen.Trainer(accelerator='cpu', precision={precision!r}, logger=False, enable_checkpointing=False); "
        "print([m for m in ('torch.distributed.tensor', 'torch._dynamo', 'sympy') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert found.splitlines()[-1] == "[]"


IMPORT_UNDER_AUDIT = """
import os, sys, threading, torch
environment, threads = dict(os.environ), threading.active_count()
seen = []

def watch(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system",
                         "os.putenv", "os.remove", "os.mkdir", "os.rename", "shutil.", "pickle.",
                         "marshal.dump")):
        seen.append((event, str(arguments)))
    if event == "open":
        path, mode, flags = arguments
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        kinds = (".py", ".pyc", ".so", ".pyi", ".txt", ".pth", "METADATA")
        if writes or not (str(path).endswith(kinds) or path in sys.path):  # where Python itself looks for modules
            seen.append((event, str(path)))

sys.addaudithook(watch)
import fulmen
fulmen.Trainer, fulmen.LightningModule, fulmen.Resume, fulmen.Callback
import fulmen_checkpoint, fulmen_data, fulmen_fabric, fulmen_precision, fulmen_strategies
from fulmen.callbacks import EarlyStopping, ModelCheckpoint
from fulmen.loggers import CSVLogger
print(seen, dict(os.environ) == environment, threading.active_count() == threads)
"""


def test_importing_fulmen_opens_no_connection_starts_nothing_and_writes_nothing() -> None:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", IMPORT_UNDER_AUDIT]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    assert found.strip() == "[] True True"


def test_settings_changed_during_a_run_take_over_after_the_batch_in_hand() -> None:
    class Change(fulmen.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                trainer.accumulate_grad_batches = 2

    run = trainer(callbacks=[Change()])
    run.fit(Model(), DataLoader(torch.randn(16, 2), batch_size=2))  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset

    assert run.global_step == 2 + 3, "two single batches, then three windows of two"
