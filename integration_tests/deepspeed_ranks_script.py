"""What DeepSpeed does on some ranks, all in one run of them: ``python deepspeed_ranks_script.py FOLDER RANKS [CASES]``.

With one rank it also loads what two have saved. Rank 0 writes what it found to ``FOLDER/RANKS.json``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import ModelCheckpoint
from fulmen.plugins import DeepSpeedPrecision
from fulmen.strategies import DeepSpeedStrategy

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER, RANKS = Path(sys.argv[1]), int(sys.argv[2])
SAMPLES, BATCH = 40, 8
STAGES = ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]
found: dict[str, Any] = {}


def data() -> TensorDataset:
    make = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(SAMPLES, 6, generator=make), torch.randn(SAMPLES, 2, generator=make))


def loader() -> DataLoader[Any]:
    """This rank's part: together the ranks' batches are those of one process that reads in order."""
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))  # rank 0 starts the others
    return DataLoader(TensorDataset(*(each[rank::RANKS] for each in data().tensors)), batch_size=BATCH // RANKS)


class Net(fulmen.LightningModule):
    """Sizes that two ranks cannot share evenly, a parameter of the module's own, and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
        self.scale = nn.Parameter(torch.ones(3)[:2].clone())
        self.register_buffer("seen", torch.zeros(()))
        self.losses: list[float] = []
        self.rates: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.mse_loss(self(batch[0]), batch[1])
        self.seen += 1
        self.losses.append(self.trainer.strategy.reduce(loss.detach().float()).item())
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        optimizers = self.trainer.optimizers
        self.rates.append(optimizers[0].param_groups[0]["lr"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.mse_loss(self(batch[0]).float(), batch[1].float()), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Bare(Net):
    """Without an optimizer of its own."""

    configure_optimizers = fulmen.LightningModule.configure_optimizers


def trainer(strategy: Any, **settings: Any) -> fulmen.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    given = {
        "max_epochs": 1,
        "enable_checkpointing": False,
        "devices": RANKS,
        "use_distributed_sampler": False,
        **settings,
    }
    return fulmen.Trainer(accelerator="cpu", strategy=strategy, default_root_dir=FOLDER, **quiet, **given)


def weights(run: fulmen.Trainer) -> dict[str, list[float]]:
    placed = run.strategy.model
    state = run.strategy.backend.module_state(placed, full=True) if hasattr(placed, "engine") else placed.state_dict()
    return {name: value.double().reshape(-1).tolist() for name, value in state.items()}


def trained(
    strategy: Any, module: Net | None = None, fit: dict[str, Any] | None = None, **settings: Any
) -> dict[str, Any]:
    """Losses, weights, learning rates and number of steps of a fit."""
    net, run = module or Net(), trainer(strategy, **settings)
    run.fit(net, loader(), loader(), **(fit or {}))
    seen = {name: value.item() for name, value in run.callback_metrics.items()}
    return {
        "losses": net.losses, "weights": weights(run), "rates": net.rates, "steps": run.global_step, "metrics": seen,
    }  # fmt: skip


WINDOWS: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}


def stages() -> None:
    """Each stage with windows, the last one short, and clipping; then evaluation of what was trained."""
    for name in STAGES:
        net, run = Net(), trainer(name, **WINDOWS)
        run.fit(net, loader(), loader())
        result = {"losses": net.losses, "weights": weights(run), "rates": net.rates, "steps": run.global_step}
        result["validated"] = run.callback_metrics["loss"].item()
        result["batch"] = run.strategy.model.engine.train_micro_batch_size_per_gpu()
        result["tested"] = run.test(net, loader(), verbose=False)[0]["loss"]
        found[name] = result
    found["stage_0"] = trained(DeepSpeedStrategy(stage=0), **WINDOWS)


def halves() -> None:
    """bfloat16, by flag and by plugin; weights are handed out in float32 where the precision keeps them so."""
    for stage in (2, 3):
        found[f"bf16-mixed {stage}"] = trained(DeepSpeedStrategy(stage=stage), precision="bf16-mixed")
    found["plugin"] = trained("deepspeed", plugins=DeepSpeedPrecision("bf16-mixed"))
    found["bf16-true"] = trained("deepspeed", precision="bf16-true")


def checkpoints() -> None:
    """Save after an epoch, resume, and compare with a run that did not stop; weights alone are one file."""
    for name in STAGES[1:]:
        keep = ModelCheckpoint(dirpath=FOLDER / name, filename="first", save_last="link", monitor=None)
        run, net = trainer(name, callbacks=[keep], enable_checkpointing=True, **WINDOWS), Net()
        run.fit(net, loader())
        run.save_checkpoint(FOLDER / f"{name}.weights", weights_only=True)
        run.save_checkpoint(FOLDER / f"{name}.whole")
        found[f"saved {name}"] = weights(run)
        found[f"names {name}"] = sorted(one.name for one in (FOLDER / f"{name}.whole").iterdir())
        path = str(FOLDER / name / "last.ckpt")
        found[f"resumed {name}"] = trained(name, fit={"ckpt_path": path}, max_epochs=2, **WINDOWS)
        found[f"unbroken {name}"] = trained(name, max_epochs=2, **WINDOWS)
        single = DeepSpeedStrategy(stage=3 if name.endswith("3") else 2, load_full_weights=True)
        tested = trainer(single).test(Net(), loader(), ckpt_path=f"{FOLDER / name}.weights", verbose=False)
        found[f"single {name}"] = tested[0]["loss"]
        found[f"folder {name}"] = trainer(name).test(Net(), loader(), ckpt_path=path, verbose=False)[0]["loss"]


def resized() -> None:
    """What two ranks have saved, on one."""
    for name in STAGES[1:]:
        path = str(FOLDER / name / "last.ckpt")
        found[f"resized {name}"] = trained(name, fit={"ckpt_path": path}, max_epochs=2, **WINDOWS)


class Offloaded(Net):
    def configure_optimizers(self) -> Any:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(self.parameters(), lr=0.05, weight_decay=0.01, adamw_mode=True)


class MadeLate(Net):
    """Its layers are made where the strategy wants them."""

    def __init__(self) -> None:
        super().__init__()
        del self.net, self.scale
        self.is_made = False

    def configure_model(self) -> None:
        if not self.is_made:
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2))
            self.scale = nn.Parameter(torch.ones(2))
            self.is_made = True


def offload() -> None:
    """Optimizer state, and in stage 3 parameters, in host memory; and a model that is spread as it is made."""
    for name in ("deepspeed_stage_1_offload", "deepspeed_stage_2_offload", "deepspeed_stage_3_offload"):
        found[name] = trained(name, Offloaded())
    found["made late"] = trained("deepspeed_stage_3", MadeLate(), **WINDOWS)


def configured() -> None:
    """An optimizer and a scheduler from the configuration, in place of the module's."""
    adam = {"type": "AdamW", "params": {"lr": 0.05, "torch_adam": True}}
    warmup = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.05, "warmup_num_steps": 4,
                                             "warmup_type": "linear"}}  # fmt: skip
    config = {"zero_optimization": {"stage": 2}, "optimizer": adam, "scheduler": warmup}
    found["configured"] = trained(DeepSpeedStrategy(config=config), Bare())
    found["configured alone"] = trained(DeepSpeedStrategy(config={"zero_optimization": {"stage": 1}}))


class Manual(Net):
    """Runs its own backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = F.mse_loss(self(batch[0]), batch[1])
        self.losses.append(self.trainer.strategy.reduce(loss.detach()).item())
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def manual() -> None:
    for name in STAGES[1:]:
        found[f"manual {name}"] = trained(name, Manual())
    found["overridden"] = _overridden()


class Overrides(Net):
    def backward(self, loss: Tensor) -> None:
        raise AssertionError("the engine runs it")

    def configure_gradient_clipping(self, *_: Any) -> None:
        found["clipping hook called"] = True


def _overridden() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained("deepspeed", Overrides(), limit_train_batches=1)
    return [str(one.message) for one in caught if "overrides" in str(one.message)]


def refusals() -> None:
    """Each with the first line of its message."""

    def told(what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            found[f"refused {what}"] = str(error)
        else:
            found[f"refused {what}"] = None

    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            return None

    told("value", lambda: trained("deepspeed", gradient_clip_val=1.0, gradient_clip_algorithm="value"))
    told("accumulation", lambda: trained(DeepSpeedStrategy(config={"gradient_accumulation_steps": 2})))
    told("fp16", lambda: trained("deepspeed", precision="16-mixed"))
    told("nothing", lambda: trained("deepspeed", Skips()))
    told(
        "part",
        lambda: trainer(STAGES[1]).test(Net(), loader(), ckpt_path=FOLDER / STAGES[1] / "last.ckpt" / "checkpoint"),
    )
    told("stage", lambda: trained(STAGES[2], fit={"ckpt_path": str(FOLDER / STAGES[1] / "last.ckpt")}, max_epochs=2))
    told("storage", lambda: _with_options())


def _with_options() -> None:
    run = trainer("deepspeed", limit_train_batches=1)
    run.fit(Net(), loader())
    run.save_checkpoint(FOLDER / "never", storage_options={"key": "value"})


def fabric() -> None:
    """Two engines; the module's own optimizer; checkpoints among other objects; a scheduler that the engine steps."""
    fab = fulmen.Fabric(accelerator="cpu", devices=RANKS, strategy=DeepSpeedStrategy(stage=2))
    fab.launch()
    first, second = Net(), Net()
    schedule_optimizer = torch.optim.SGD(first.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(schedule_optimizer, 1, 0.5)
    one, one_optimizer, _ = fab.setup(first, schedule_optimizer, scheduler=schedule)
    two, two_optimizer = fab.setup(second, torch.optim.SGD(second.parameters(), lr=0.1))
    losses: list[list[float]] = []
    batches = fab.setup_dataloaders(loader(), use_distributed_sampler=False)
    for x, y in batches:
        row: list[float] = []
        for model, optimizer in ((one, one_optimizer), (two, two_optimizer)):
            loss = F.mse_loss(model(x), y)
            fab.backward(loss, model=model)
            optimizer.step()
            row.append(fab.all_reduce(loss.detach()).item())
        losses.append(row)
    found["fabric"] = losses
    found["fabric rate"] = one_optimizer.param_groups[0]["lr"]
    for what, action in {
        "model": lambda: fab.backward(F.mse_loss(one(x), y)),
        "clip": lambda: fab.clip_gradients(one, one_optimizer, max_norm=1.0),
        "both": lambda: fab.save(FOLDER / "both", {"one": one, "two": two}),
    }.items():
        try:
            action()
        except ValueError as error:
            found[f"fabric {what}"] = str(error)
    fab.save(FOLDER / "fabric", {"model": two, "optimizer": two_optimizer, "lr_scheduler": {"last": 3}, "step": 5})
    third = Net()
    again, again_optimizer = fab.setup(third, torch.optim.SGD(third.parameters(), lr=0.1))
    state = {"model": again, "optimizer": again_optimizer, "step": 0}
    rest = fab.load(FOLDER / "fabric", state)
    found["fabric loaded"] = [state["step"], rest]
    mine, theirs = again.state_dict(), two.state_dict()
    found["fabric equal"] = all(torch.equal(mine[name], theirs[name]) for name in theirs)
    found["fabric unwrapped"] = type(again.module).__name__


CASES: dict[str, Callable[[], None]] = {
    "stages": stages, "halves": halves, "checkpoints": checkpoints, "configured": configured, "manual": manual,
    "refusals": refusals, "fabric": fabric, "offload": offload, "resized": resized,
}  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    chosen = sys.argv[3].split(",") if len(sys.argv) > 3 else [name for name in CASES if name != "resized"]
    for name in chosen:
        CASES[name]()
    if torch.distributed.get_rank() == 0:
        (FOLDER / f"{RANKS}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
