"""How the Trainer conducts a run: switches that it sets and gives back, windows of accumulation, errors, the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import fulmen
from fulmen._preparation import give_back_batch_norms, synchronise_batch_norms
from fulmen_loggers import CSVLogger

pytestmark = pytest.mark.filterwarnings("ignore:.*validation is left out", "ignore:log_every_n_steps")


class Line(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader(samples: int = 8) -> DataLoader[Any]:
    return DataLoader(torch.ones(samples, 2), batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def trainer(**options: Any) -> fulmen.Trainer:
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return fulmen.Trainer(**{**quiet, **options})


def switches() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )


@pytest.mark.proves("9.15")
@pytest.mark.parametrize(
    ("options", "during"),
    [
        ({}, (False, False, False)),
        ({"deterministic": True}, (True, False, False)),
        ({"deterministic": "warn"}, (True, True, False)),
        ({"benchmark": True}, (False, False, True)),
        ({"deterministic": True, "benchmark": True}, (True, False, True)),
        ({"deterministic": False, "benchmark": False}, (False, False, False)),
    ],
)
@pytest.mark.parametrize("method", ["fit", "test"])
def test_determinism_and_benchmark_are_torchs_switches_during_a_call(
    options: dict[str, Any], during: tuple[bool, bool, bool], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    class Watched(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen = (*switches(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
            return super().training_step(batch, batch_idx)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.seen = (*switches(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))

    before, model = switches(), Watched()
    getattr(trainer(**options), method)(model, loader())

    assert model.seen[:3] == during
    assert model.seen[3] == (":4096:8" if options.get("deterministic") else None)
    assert switches() == before, "given back"


@pytest.mark.proves("9.15")
def test_the_deterministic_switch_is_obeyed_by_torch() -> None:
    class NoDeterministicKernel(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            torch.empty(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]), accumulate=False)
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        trainer(deterministic=True).fit(NoDeterministicKernel(), loader())
    assert not torch.are_deterministic_algorithms_enabled(), "given back after an error, too"


@pytest.mark.proves("9.17")
def test_anomalies_are_looked_for_in_fit_only() -> None:
    class Watched(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(("fit", torch.is_anomaly_enabled()))
            return super().training_step(batch, batch_idx)

        def test_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(("test", torch.is_anomaly_enabled()))

    seen: list[tuple[str, bool]] = []
    run = trainer(detect_anomaly=True, limit_train_batches=1, limit_test_batches=1)
    run.fit(Watched(), loader())
    run.test(dataloaders=loader(), verbose=False)
    trainer(limit_train_batches=1).fit(Watched(), loader())

    assert seen == [("fit", True), ("test", False), ("fit", False)]
    assert not torch.is_anomaly_enabled()


@pytest.mark.proves("9.17", "9.45")
def test_the_root_folder_is_expanded_left_remote_or_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")

    assert trainer(default_root_dir="~/runs").default_root_dir == "/home/somebody/runs"
    assert trainer(default_root_dir="s3://bucket/runs").default_root_dir == "s3://bucket/runs"
    assert trainer(default_root_dir=Path("a/../b")).default_root_dir == "b"
    assert trainer().default_root_dir == os.getcwd()
    with pytest.raises(TypeError, match="default_root_dir=7 must be a path or a URL"):
        trainer(default_root_dir=7)


@pytest.mark.proves("9.17")
@pytest.mark.parametrize(
    "name", ["sync_batchnorm", "detect_anomaly", "use_distributed_sampler", "inference_mode", "barebones"]
)
def test_a_switch_that_is_neither_on_nor_off_is_named(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}='yes' must be True or False"):
        trainer(**{name: "yes"})


@pytest.mark.proves("9.17")
def test_synchronised_batch_norm_learns_for_the_users_layer() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    own = [model[0], model[1][0]]
    replaced = synchronise_batch_norms(model)
    assert [type(model[0]), type(model[1][0])] == [nn.SyncBatchNorm] * 2
    with torch.no_grad():
        model[0].weight.fill_(7.0)
        model[0].running_mean.fill_(3.0)
    model.eval()
    give_back_batch_norms(model, replaced)

    assert [model[0], model[1][0]] == own
    assert model[0].weight.tolist() == [7.0, 7.0]
    assert model[0].running_mean.tolist() == [3.0, 3.0]
    assert not model[0].training
    assert model[0](torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.proves("9.17", "9.31")
def test_one_process_keeps_its_batch_norm() -> None:
    class Normed(Line):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert type(self.norm) is nn.BatchNorm1d
            return self.layer(self.norm(batch)).sum()

    trainer(sync_batchnorm=True).fit(Normed(), loader())


@pytest.mark.cuda
@pytest.mark.proves("9.24")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_model_and_optimizer_are_back_on_the_cpu_when_fit_ends() -> None:
    class Watched(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(("step", self.device.type))
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

        def on_train_end(self) -> None:
            seen.append(("train end", self.device.type))

        def on_fit_end(self) -> None:
            states = self.trainer.optimizers[0].state.values()
            kinds = {tensor.device.type for state in states for tensor in state.values()}
            seen.append(("fit end", self.device.type, *kinds))

        def teardown(self, stage: str) -> None:
            seen.append(("teardown", self.device.type))

        def on_test_end(self) -> None:
            seen.append(("test end", self.device.type))

    seen: list[Any] = []
    run = trainer(accelerator="cuda", devices=1, limit_train_batches=1)
    run.fit(Watched(), loader())
    assert seen == [("step", "cuda"), ("train end", "cuda"), ("fit end", "cpu", "cpu"), ("teardown", "cpu")]
    seen.clear()
    run.test(dataloaders=loader(), verbose=False)
    assert seen == [("test end", "cuda"), ("teardown", "cpu")]

    class Failing(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ZeroDivisionError

    failing = Failing()
    with pytest.raises(ZeroDivisionError):
        trainer(accelerator="cuda", devices=1).fit(failing, loader())
    assert failing.device.type == "cpu", "after an error, too"


@pytest.mark.proves("9.24", "9.23")
def test_fit_end_and_teardown_come_after_the_loggers_values_were_taken_and_before_they_are_closed(
    tmp_path: Path,
) -> None:
    order: list[str] = []

    class Closing(CSVLogger):
        def finalize(self, status: Any) -> None:
            order.append(f"logger {status}")
            super().finalize(status)

    class Watched(Line):
        def on_train_end(self) -> None:
            order.append("train end")

        def on_fit_end(self) -> None:
            order.append("fit end")

        def teardown(self, stage: str) -> None:
            order.append("teardown")

    trainer(logger=Closing(tmp_path)).fit(Watched(), loader())
    assert order == ["train end", "fit end", "teardown", "logger success"]


class Windows(Line):
    """Its gradient for the weight is the sum of the batch: windows can be read off the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.weights: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append(round(self.layer.weight.item(), 4))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.proves("9.13")
@pytest.mark.parametrize("known", [True, False])
def test_a_short_last_window_steps_with_the_scale_of_a_whole_one(known: bool) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(values)

    values = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    data: Any = values if known else Stream()
    model = Windows()
    run = trainer(accumulate_grad_batches=3, max_epochs=2)
    run.fit(model, DataLoader(data, batch_size=1))

    # (1 + 2 + 4) / 3, then (8 + 16) / 3: divided by 3 although it holds two; nothing is carried into the next epoch
    assert model.weights[:5] == [0, 0, -2.3333, -2.3333, -10.3333]
    assert model.weights[9] == pytest.approx(2 * -10.3333, abs=1e-3)
    assert run.global_step == 4


@pytest.mark.proves("9.13", "9.37")
def test_a_stream_that_ends_before_its_limit_still_steps_and_validates() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(torch.ones(3, 1))

    class Claiming(Stream):
        def __len__(self) -> int:
            return 7

    class Validated(Windows):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.weights.append(-99.0)

    for stream in (Stream(), Claiming()):
        model = Validated()
        run = trainer(accumulate_grad_batches=2, limit_train_batches=6)
        run.fit(model, DataLoader(stream, batch_size=1), DataLoader(torch.ones(1, 1)))  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset
        assert run.global_step == 2
        assert model.weights == [0, -1, -1.5, -99]


@pytest.mark.proves("9.37")
@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
def test_a_step_that_fetches_its_batches_is_said_to_be_experimental(method: str) -> None:
    class Fetching(Line):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]  # with other arguments, on purpose
            batch, _, _ = next(dataloader_iter)
            return self.layer(batch).sum()

        def validation_step(self, dataloader_iter: Any) -> None:  # type: ignore[override]  # with other arguments, on purpose
            next(dataloader_iter)
            self.log("size", 1.0, on_step=False, on_epoch=True)

        def test_step(self, dataloader_iter: Any) -> None:  # type: ignore[override]  # with other arguments, on purpose
            next(dataloader_iter)

        def predict_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]  # with other arguments, on purpose
            return next(dataloader_iter)[0].sum()

    name = {"fit": "training", "validate": "validation"}.get(method, method)
    run = trainer()
    with pytest.warns(
        UserWarning, match=f"Fetching.{name}_step.* take.*dataloader_iter, which is experimental"
    ) as said:
        getattr(run, method)(Fetching(), loader())
    assert any("Take (batch, batch_idx) if you do not need it" in str(warning.message) for warning in said)


@pytest.mark.proves("9.37")
def test_a_step_that_fetches_more_than_there_is_ends_the_epoch() -> None:
    class Greedy(Line):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]  # with other arguments, on purpose
            batches = [next(dataloader_iter)[0] for _ in range(3)]
            return self.layer(torch.cat(batches)).sum()

        def on_train_epoch_end(self) -> None:
            self.ended = True

    model, run = Greedy(), trainer()
    with pytest.warns(UserWarning, match="takes dataloader_iter"):
        run.fit(model, loader(8))  # four batches: one step of three, and one that finds a single batch

    assert model.ended
    assert run.current_epoch == 1


@pytest.mark.proves("3.7")
def test_a_step_without_a_loss_is_neither_unscaled_nor_stepped() -> None:
    class Skipping(Line):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx < 2 else 0.001 * self.layer(batch).float().sum()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            hooks.append(len(batches) - 1)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            state = self.trainer.scaler.state_dict()
            batches.append((state["scale"], state["_growth_tracker"]))

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            weights.append(self.layer.weight.detach().clone())

    hooks: list[int] = []
    batches: list[tuple[float, int]] = []
    weights: list[torch.Tensor] = []
    model = Skipping()
    first = model.layer.weight.detach().clone()
    trainer(precision="16-mixed").fit(model, loader(8))

    assert hooks == [2, 3]
    assert batches[0] == batches[1] == batches[2], "the scaler saw no step of the batches that were left out"
    assert batches[3][1] == batches[2][1] + 1
    assert torch.equal(weights[0], first)
    assert torch.equal(weights[1], first)
    assert not torch.equal(weights[2], first)


@pytest.mark.proves("3.7")
def test_a_scaler_and_lbfgs_are_refused_with_the_precisions_that_work() -> None:
    class Quasi(Line):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ValueError, match=r"LBFGS evaluates its closure.*Use precision='bf16-mixed' or '32-true'"):
        trainer(precision="16-mixed").fit(Quasi(), loader())


@pytest.mark.proves("3.7")
def test_a_fused_optimizer_is_unscaled_and_clipped_like_any_other() -> None:
    class Fused(Line):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            nn.init.constant_(self.layer.weight, 0.5)
            nn.init.zeros_(self.layer.bias)
            self.fused = fused

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, fused=self.fused)

    models = [Fused(fused) for fused in (False, True)]
    for model in models:
        trainer(precision="16-mixed", gradient_clip_val=0.5).fit(model, loader())

    assert torch.allclose(models[0].layer.weight, models[1].layer.weight)


@pytest.mark.proves("9.49")
def test_ctrl_c_ends_a_script_in_order_with_exit_status_130(tmp_path: Path) -> None:
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import os, signal, torch, fulmen\n"
        "from torch.utils.data import DataLoader\n"
        "from fulmen_loggers import CSVLogger\n"
        "class Logger(CSVLogger):\n"
        "    def finalize(self, status):\n"
        "        print('logger', status, flush=True)\n"
        "class Model(fulmen.LightningModule):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(2, 1)\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        return self.layer(batch).sum()\n"
        "    def configure_optimizers(self):\n"
        "        return torch.optim.SGD(self.parameters(), lr=0.1)\n"
        "class Watch(fulmen.Callback):\n"
        "    def on_exception(self, trainer, module, exception):\n"
        "        print('exception', type(exception).__name__, trainer.state.status.value, flush=True)\n"
        f"trainer = fulmen.Trainer(accelerator='cpu', max_epochs=1, logger=Logger({str(tmp_path)!r}),\n"
        "    callbacks=[Watch()], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)\n"
        "try:\n"
        "    trainer.fit(Model(), DataLoader(torch.ones(4, 2)))\n"
        "finally:\n"
        "    print('interrupted', trainer.interrupted, trainer.state.stage)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, check=False)

    assert done.returncode in (-2, 130), done.stderr  # a shell shows a death by SIGINT as 130
    assert done.stdout.splitlines() == [
        "exception KeyboardInterrupt interrupted",
        "logger failed",
        "interrupted True None",
    ]
