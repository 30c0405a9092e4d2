"""A fit that its scheduler or SIGTERM ends early, on one process: where it stops, what is left, how it goes on."""

from __future__ import annotations

import logging
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from fulmen.exceptions import PreemptedException, SIGTERMException
from fulmen.plugins import LightningEnvironment, SLURMEnvironment

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings(
    "ignore:the checkpoint folder",
    "ignore:checkpoints are saved in",
    "ignore:the checkpoint holds the state of callbacks",
)

TASK = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_NODELIST": "node[3-4]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


class Scheduler:
    """A ``scontrol`` on PATH that writes down its arguments; it stands for the program that SLURM installs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "bin"
        self.folder.mkdir()
        self.record = folder / "scontrol.calls"
        self.answer()

    def answer(self, *, code: int = 0, text: str = "") -> None:
        program = self.folder / "scontrol"
        program.write_text(f'#!/bin/sh\necho "$@" >> {self.record}\necho "{text}" >&2\nexit {code}\n')
        program.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self.record.read_text().splitlines() if self.record.exists() else []


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    found = Scheduler(tmp_path)
    monkeypatch.setenv("PATH", f"{found.folder}{os.pathsep}{os.environ['PATH']}")
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    return found


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Sends(Callback):
    """Sends this process a signal at the end of each of the given steps, and notes what happens then."""

    def __init__(self, *steps: int, number: signal.Signals = signal.SIGUSR1) -> None:
        self.steps, self.number = steps, number
        self.events: list[str] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step in self.steps:
            os.kill(os.getpid(), self.number)

    def on_train_epoch_end(self, *_: Any) -> None:
        self.events.append("epoch end")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.events.append(type(exception).__name__)


class Ledger:
    """A logger that remembers how its runs ended, and what had happened by then."""

    name, version = "ledger", 0

    def __init__(self, scheduler: Scheduler, root: Path) -> None:
        self.scheduler, self.root = scheduler, root
        self.ends: list[tuple[str, int]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any) -> None: ...

    def save(self) -> None: ...

    def finalize(self, status: str) -> None:
        self.ends.append((status, len(self.scheduler.calls)))


def loader(workers: int = 0) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(26, 4, generator=generator), torch.randint(0, 3, (26,), generator=generator))
    return DataLoader(data, batch_size=4, shuffle=True, num_workers=workers)  # 7 batches


def make(root: Path, *callbacks: Any, **options: Any) -> fulmen.Trainer:
    quiet = {"logger": False, "enable_checkpointing": None, "enable_progress_bar": False, "enable_model_summary": False}
    if not any(isinstance(each, (ModelCheckpoint, OnExceptionCheckpoint)) for each in callbacks):
        quiet["enable_checkpointing"] = False
    options = {**quiet, "max_epochs": 3, "accelerator": "cpu", **options}
    return fulmen.Trainer(default_root_dir=str(root), callbacks=list(callbacks), **options)


def bits(trainer: fulmen.Trainer, model: nn.Module) -> list[torch.Tensor]:
    state = trainer.optimizers[0].state_dict()["state"].values()
    return [*model.state_dict().values(), *(value for entry in state for value in entry.values())]


def whole(root: Path, workers: int = 0, **options: Any) -> list[torch.Tensor]:
    """Weights and moments of the run that nobody interrupts."""
    torch.manual_seed(3)
    model, trainer = Model(), make(root, **options)
    trainer.fit(model, loader(workers))
    return bits(trainer, model)


def assert_equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.proves("4.44", "4.45", "5.29", "6.8")
@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 1), (0, 2)])
def test_a_preempted_fit_is_saved_queued_again_and_goes_on_bit_for_bit(
    workers: int, accumulate: int, scheduler: Scheduler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"accumulate_grad_batches": accumulate}
    expected = whole(tmp_path / "whole", workers, **options)
    root = tmp_path / "job"
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)

    torch.manual_seed(3)
    for life, step in enumerate((2, 6), start=1):
        ledger, sends = Ledger(scheduler, root), Sends(step)
        trainer = make(root, sends, logger=ledger, **options)
        with pytest.raises(PreemptedException) as ended:
            trainer.fit(Model(), loader(workers))
        assert ended.value.code == 75
        assert ended.value.ckpt_path == str(root / f"hpc_ckpt_{life}.ckpt")
        assert trainer.global_step == step, "one process stops after the batch in hand"
        assert sends.events[-1:] == ["PreemptedException"]
        assert scheduler.calls == ["requeue 4711"] * life
        assert ledger.ends == [("finished", life - 1)], "finalized once, before the scheduler may end the job"
        assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == before
        torch.manual_seed(99 + life)  # the next life begins with a fresh model in a fresh process

    model, trainer = Model(), make(root, **options)
    with caplog.at_level(logging.INFO):
        trainer.fit(model, loader(workers))
    assert f"goes on from {root}/hpc_ckpt_2.ckpt" in caplog.text
    assert_equal(bits(trainer, model), expected)
    assert len(scheduler.calls) == 2
    assert sorted(path.name for path in root.glob("*ckpt*")) == ["hpc_ckpt_1.ckpt", "hpc_ckpt_2.ckpt"]


@pytest.mark.proves("4.44")
def test_a_task_of_an_array_is_queued_again_alone(
    scheduler: Scheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "4700")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "11")
    with pytest.raises(PreemptedException):
        make(tmp_path, Sends(1)).fit(Model(), loader())
    assert scheduler.calls == ["requeue 4700_11"]


@pytest.mark.proves("4.44")
def test_sigterm_does_not_end_a_fit_whose_job_is_queued_again_at_another_signal(
    scheduler: Scheduler, tmp_path: Path
) -> None:
    trainer = make(tmp_path, Sends(2, number=signal.SIGTERM), Sends(5))
    with pytest.raises(PreemptedException):
        trainer.fit(Model(), loader())
    assert trainer.global_step == 5

    trainer = make(tmp_path, Sends(9, number=signal.SIGTERM), plugins=SLURMEnvironment(requeue_signal=signal.SIGTERM))
    with pytest.raises(PreemptedException):
        trainer.fit(Model(), loader())
    assert trainer.global_step == 9
    assert len(scheduler.calls) == 2


@pytest.mark.proves("4.44")
def test_the_users_handler_stays_and_that_is_said_once(
    scheduler: Scheduler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: calls.append(1))
    try:
        trainer = make(tmp_path, Sends(2), Sends(4, number=signal.SIGTERM))
        with caplog.at_level(logging.INFO):
            with pytest.raises(SIGTERMException):
                trainer.fit(Model(), loader())
            with pytest.raises(SIGTERMException):
                make(tmp_path, Sends(1, number=signal.SIGTERM)).fit(Model(), loader())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (calls, trainer.global_step) == ([1], 4), "nothing is bypassed then"
    assert scheduler.calls == []
    assert not list(tmp_path.glob("hpc*"))
    said = [text for text in caplog.messages if "SIGUSR1" in text]
    assert len(said) == 2, "once by each Trainer"
    assert all("has a handler for it already" in text and "requeue_signal" in text for text in said)


@pytest.mark.proves("4.44")
def test_without_auto_requeue_the_signal_is_left_alone(scheduler: Scheduler, tmp_path: Path) -> None:
    found: list[Any] = []

    class Looks(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            found.extend([signal.getsignal(signal.SIGUSR1), trainer.received_sigterm])

    make(tmp_path, Looks(), plugins=SLURMEnvironment(auto_requeue=False), max_epochs=1).fit(Model(), loader())
    assert found == [signal.SIG_DFL, False]


@pytest.mark.proves("4.44")
def test_a_scheduler_that_refuses_is_quoted_and_the_checkpoint_is_there(scheduler: Scheduler, tmp_path: Path) -> None:
    scheduler.answer(code=3, text="Requeue of job is disabled")
    refused = r"hpc_ckpt_1.ckpt: 'scontrol requeue 4711' ended with exit code 3 and said: Requeue of job is disabled"
    with pytest.warns(UserWarning, match=refused), pytest.raises(PreemptedException) as ended:
        make(tmp_path, Sends(1)).fit(Model(), loader())
    assert ended.value.code == 75
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists()


def preempted_at(step: int, root: Path) -> None:
    with pytest.raises(PreemptedException):
        make(root, Sends(step)).fit(Model(), loader())


@pytest.mark.proves("4.45")
def test_an_explicit_checkpoint_wins_over_that_of_the_requeued_job(scheduler: Scheduler, tmp_path: Path) -> None:
    preempted_at(2, tmp_path)
    preempted_at(5, tmp_path)

    class First(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            steps.append(trainer.global_step)

    steps: list[int] = []
    make(tmp_path, First()).fit(Model(), loader(), ckpt_path=tmp_path / "hpc_ckpt_1.ckpt")
    make(tmp_path, First()).fit(Model(), loader(), ckpt_path="hpc")
    make(tmp_path, First()).fit(Model(), loader())
    chosen = make(tmp_path, First())
    chosen.ckpt_path = str(tmp_path / "hpc_ckpt_1.ckpt")
    chosen.fit(Model(), loader())
    make(tmp_path, First(), plugins=LightningEnvironment()).fit(Model(), loader())
    assert steps == [2, 5, 5, 2, 0]


@pytest.mark.proves("4.45")
def test_a_damaged_checkpoint_of_a_requeued_job_is_passed_over(scheduler: Scheduler, tmp_path: Path) -> None:
    preempted_at(2, tmp_path)
    preempted_at(5, tmp_path)
    newest = tmp_path / "hpc_ckpt_2.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])

    trainer = make(tmp_path, max_steps=3)
    with pytest.warns(UserWarning, match=r"hpc_ckpt_2.ckpt is damaged and is passed over"):
        trainer.fit(Model(), loader())
    assert trainer.global_step == 3, "the run went on from step 2"


@pytest.mark.proves("4.45")
def test_testing_in_a_requeued_job_uses_the_model_as_it_is(scheduler: Scheduler, tmp_path: Path) -> None:
    preempted_at(2, tmp_path)
    model, trainer = Model(), make(tmp_path)
    trainer.fit(model, loader())
    weights = [value.clone() for value in model.state_dict().values()]
    trainer.test(model, loader(), verbose=False)
    assert_equal(list(model.state_dict().values()), weights)


class Acme:
    """A vendor's scheduler: whole by the protocols, and a stranger to this project."""

    creates_processes_externally = True
    main_address, main_port = "127.0.0.1", 29999
    auto_requeue, requeue_signal = True, signal.SIGUSR2

    def __init__(self) -> None:
        self.asked = 0

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return 1

    def global_rank(self) -> int:
        return 0

    local_rank = node_rank = global_rank

    def validate_settings(self, num_devices: int, num_nodes: int) -> None: ...

    def requeue(self) -> None:
        self.asked += 1


@pytest.mark.proves("4.44", "4.45")
def test_any_scheduler_that_can_be_asked_is_served_alike(tmp_path: Path) -> None:
    acme = Acme()
    with pytest.raises(PreemptedException):
        make(tmp_path, Sends(4, number=signal.SIGUSR2), plugins=acme).fit(Model(), loader())
    assert acme.asked == 1

    trainer = make(tmp_path, plugins=acme, max_steps=5)
    trainer.fit(Model(), loader())
    assert (acme.asked, trainer.global_step) == (1, 5)


@pytest.mark.proves("9.51")
@pytest.mark.parametrize(
    "savers",
    [
        lambda folder: [ModelCheckpoint(folder)],
        lambda folder: [
            ModelCheckpoint(folder / "more", every_n_epochs=2),
            ModelCheckpoint(folder, save_on_exception=True),
        ],
        lambda folder: [ModelCheckpoint(folder / "more"), OnExceptionCheckpoint(folder)],
    ],
)
def test_what_sigterm_ends_is_saved_once_in_the_middle_of_the_epoch_and_goes_on_bit_for_bit(
    savers: Callable[[Path], list[Any]], tmp_path: Path
) -> None:
    expected = whole(tmp_path / "whole")
    torch.manual_seed(3)
    sends = Sends(10, number=signal.SIGTERM)
    trainer = make(tmp_path, sends, *savers(tmp_path / "kept"))
    with pytest.raises(SIGTERMException) as ended:
        trainer.fit(Model(), loader())
    assert ended.value.code == 143
    assert sends.events == ["epoch end", "SIGTERMException"], "the second epoch is left open"
    saved = [(torch.load(path, weights_only=True)["global_step"], path) for path in (tmp_path / "kept").rglob("*.ckpt")]
    (found,) = [path for step, path in saved if step == 10]

    torch.manual_seed(99)
    model, trainer = Model(), make(tmp_path)
    trainer.fit(model, loader(), ckpt_path=found)
    assert_equal(bits(trainer, model), expected)


@pytest.mark.proves("9.51")
def test_sigterm_outside_of_a_fit_does_what_it_did_before(tmp_path: Path) -> None:
    calls: list[str] = []

    class Looks(Callback):
        def on_test_start(self, trainer: Any, pl_module: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: calls.append("mine"))
    try:
        trainer = make(tmp_path, Looks())
        trainer.test(Model(), loader(), verbose=False)
        assert calls == ["mine"]
        trainer.fit(Model(), loader())
        assert trainer.global_step == 21, "and no later fit is ended by it"
    finally:
        signal.signal(signal.SIGTERM, before)
