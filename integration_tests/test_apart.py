"""A Trainer and a Fabric whose processes are made for each call: what comes back, and what is refused.

This file is also a script: ``python test_apart.py FOLDER`` trains by spawn.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import Callback, EarlyStopping, ModelCheckpoint
from fulmen.loggers import CSVLogger
from fulmen.tuner import Tuner
from fulmen_protocols import MisconfigurationException, RankFailure


class Model(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.layer(batch[0]).square().mean(), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("rank", float(self.trainer.global_rank), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Fails(Callback):
    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 2:
            raise LookupError("sample 7 is missing")


def loader() -> Any:
    data = TensorDataset(torch.randn(32, 4, generator=torch.Generator().manual_seed(3)))
    return DataLoader(data, batch_size=16)  # all that a rank has: its order does not matter


def trainer_for(folder: Path, strategy: str, epochs: int = 2, *callbacks: Any, devices: int = 2) -> fulmen.Trainer:
    return fulmen.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=epochs,
        logger=CSVLogger(folder),
        callbacks=[ModelCheckpoint(monitor="val"), EarlyStopping("val", patience=9), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
    )


def seeded() -> Model:
    torch.manual_seed(5)
    return Model()


def by_hand(epochs: int) -> torch.Tensor:
    """The weights that plain torch gets from the averaged gradients of two ranks."""
    model = seeded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    samples = loader().dataset.tensors[0]
    for _ in range(epochs):
        optimizer.zero_grad()
        model.layer(samples).square().mean().backward()
        optimizer.step()
    return model.layer.weight.detach()


def script(folder: Path) -> None:
    warnings.simplefilter("ignore")
    trainer, model = trainer_for(folder, "ddp_spawn", 1), seeded()
    trainer.fit(model, loader(), loader())
    result = {
        "weight": model.layer.weight.tolist(),
        "step": trainer.global_step,
        "best": trainer.checkpoint_callback.best_model_path,
        "val": trainer.callback_metrics["val"].item(),
        "seen": model.seen,
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    script(Path(sys.argv[1]))
    sys.exit()

# ---------------------------------------------------------------------------------------------------- the judges


@pytest.fixture(autouse=True)
def shuffles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.filterwarnings("ignore:the checkpoint folder")  # as for any second fit of a Trainer
@pytest.mark.proves("4.2", "4.36")
def test_what_a_fit_in_forked_processes_has_achieved_comes_back_and_a_second_one_goes_on(tmp_path: Path) -> None:
    trainer, model = trainer_for(tmp_path, "ddp_notebook"), seeded()
    trainer.fit(model, loader(), loader())

    once = model.layer.weight.detach().clone()
    assert (trainer.current_epoch, trainer.global_step, str(trainer.state.status)) == (2, 2, "finished")
    assert {"val", "loss"} <= trainer.callback_metrics.keys()
    assert {"val", "loss"} <= trainer.logged_metrics.keys()
    assert trainer.progress_bar_metrics["loss"] == pytest.approx(trainer.callback_metrics["loss"].item())
    best = trainer.checkpoint_callback.best_model_path
    assert Path(best).is_file()
    assert trainer.checkpoint_callback.best_model_score == trainer.callback_metrics["val"]
    assert trainer.early_stopping_callback.best_score == trainer.callback_metrics["val"]
    assert torch.equal(torch.load(best)["state_dict"]["layer.weight"], once)
    assert model.seen == 0, "attributes stay where they were set"
    assert not torch.distributed.is_initialized()

    trainer.fit_loop.max_epochs = 3
    trainer.fit(model, loader(), loader())
    assert (trainer.current_epoch, trainer.global_step) == (3, 3)
    assert not torch.equal(model.layer.weight, once)
    torch.testing.assert_close(model.layer.weight.detach(), by_hand(3), atol=1e-6, rtol=1e-5)
    assert [path.name for path in (tmp_path / "lightning_logs").iterdir()] == ["version_0"], "one run, one folder"

    assert trainer.test(model, loader(), verbose=False) == [{"rank": 0.5}]
    predictions = trainer.predict(model, loader())
    assert predictions is not None
    assert len(predictions) == 1, "those of rank 0"
    torch.testing.assert_close(predictions[0], model.layer(loader().dataset.tensors[0][::2]).detach())


@pytest.mark.proves("4.36")
def test_a_checkpoint_after_the_processes_have_ended_holds_weights_alone(tmp_path: Path) -> None:
    trainer, model = trainer_for(tmp_path, "ddp_fork", 1), seeded()
    trainer.fit(model, loader(), loader())
    with pytest.raises(
        MisconfigurationException, match="strategy 'ddp_fork' had its optimizers in processes that have"
    ):
        trainer.save_checkpoint(tmp_path / "all.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "weights.ckpt")["state_dict"]["layer.weight"]
    assert torch.equal(saved, model.layer.weight)
    with pytest.raises(MisconfigurationException, match=r"Tuner was used with strategy 'ddp_fork'.*one device"):
        Tuner(trainer).lr_find(model, loader())
    with trainer.init_module():
        assert Model().layer.weight.device.type == "cpu"


@pytest.mark.proves("4.36")
def test_an_error_in_the_processes_is_one_here(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, "ddp_fork", 2, Fails())
    with pytest.raises(RankFailure, match=r"(?s)rank 1 of 2 .*failed first.*LookupError: sample 7 is missing"):
        trainer.fit(seeded(), loader(), loader())
    assert str(trainer.state.status) == "interrupted"


@pytest.mark.proves("4.36")
def test_a_fit_in_spawned_processes_does_what_plain_torch_does(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=env)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    torch.testing.assert_close(torch.tensor(result["weight"]), by_hand(1), atol=1e-6, rtol=1e-5)
    assert (result["step"], result["seen"]) == (1, 0)
    assert Path(result["best"]).is_file()


def work(fabric: fulmen.Fabric, offset: float) -> dict[str, float]:
    total = fabric.all_reduce(torch.tensor(fabric.global_rank + offset), reduce_op="sum")
    model, optimizer = fabric.setup(layer := torch.nn.Linear(2, 1), torch.optim.SGD(layer.parameters(), lr=0.1))
    fabric.backward(model(torch.full((1, 2), float(fabric.global_rank))).sum())
    optimizer.step()
    return {"total": total.item(), "rank": fabric.global_rank, "gradient": layer.weight.grad[0, 0].item()}


@pytest.mark.proves("4.3", "8.4")
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook", pytest.param("ddp_spawn", marks=pytest.mark.slow)])
def test_a_fabric_runs_a_function_in_new_processes(strategy: str) -> None:
    fabric = fulmen.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    assert fabric.launch(work, 1.0) == {"total": 3.0, "rank": 0, "gradient": 0.5}
    with pytest.raises(
        MisconfigurationException, match=f"launch.. got no function, and strategy '{strategy}' runs one"
    ):
        fabric.launch()


@pytest.mark.proves("4.35")
def test_processes_by_fork_know_nothing_of_a_group_that_this_process_is_in() -> None:
    alone = fulmen.Fabric(accelerator="cpu", devices=1, strategy="ddp")
    alone.launch()
    try:
        fabric = fulmen.Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
        assert fabric.launch(work, 1.0) == {"total": 3.0, "rank": 0, "gradient": 0.5}
        assert alone.all_reduce(torch.ones(()), reduce_op="sum").item() == 1.0
    finally:
        alone.close()
