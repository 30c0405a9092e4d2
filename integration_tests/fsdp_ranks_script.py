"""What FSDP does on some ranks, all in one run of them: ``python fsdp_ranks_script.py FOLDER RANKS [ACCELERATOR]``.

With one rank it is what the others are compared with. Rank 0 writes what it found to ``FOLDER/RANKS.pt``; checkpoints
stay in ``FOLDER``, and each run also loads those of the runs before it.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import wrap
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.strategies import DDPStrategy, FSDPStrategy

SAMPLES, WINDOW, EPOCHS = 16, 2, 4
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true"]


def samples() -> TensorDataset:
    make = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(SAMPLES, 6, generator=make), torch.randint(0, 3, (SAMPLES,), generator=make))


class Block(nn.Module):
    """What is a unit; its sizes are not to be divided evenly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 7), nn.Linear(7, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Units, a layer and a bare parameter of the root, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(6), Block(6))
        self.head, self.scale = nn.Linear(6, 3), nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.tensor(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(x)) * self.scale


class Model(fulmen.LightningModule):
    """Its step uses layers of the root directly, and calls the module itself."""

    def __init__(self, *, lr: float = 0.2, on_meta: bool = False, wraps: bool = False) -> None:
        super().__init__()
        self.lr, self.on_meta, self.wraps = lr, on_meta, wraps
        self.net: Any = None
        self.norms: list[float] = []
        self.facts: dict[str, Any] = {}

    def configure_model(self) -> None:
        if self.net is not None:
            return
        torch.manual_seed(0)
        with torch.device("meta") if self.on_meta else torch.device(self.device):
            self.net = Net()
        if self.on_meta:  # what resetting draws
            self.net.scale = nn.Parameter(torch.ones(3, device=self.device))
            self.net.seen = torch.tensor(7, device=self.device)
        if self.wraps:
            self.net.blocks[0] = wrap(self.net.blocks[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.blocks(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.facts["output"] = str(self.net.head(batch[0][:1, :6]).dtype)
        logits = self.net.head(self(batch[0])) * self.net.scale
        loss = F.cross_entropy(logits.float(), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.facts["inference"] = torch.is_inference_mode_enabled()
        self.facts["grad"] = torch.is_grad_enabled()
        logits = self.net.head(self(batch[0])) * self.net.scale
        self.log("val", F.cross_entropy(logits.float(), batch[1]), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net.head(self(batch[0])) * self.net.scale

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        if gradient_clip_val is None:
            return
        norm = self.trainer.strategy.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm or "norm")
        if norm is not None:
            self.norms.append(float(norm))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Adam(Model):
    """For state with a step counter; its epsilon keeps vanishing gradients from deciding."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, eps=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}


class WatchedMetric(torchmetrics.MeanMetric):
    """Notes where it is moved."""

    places: list[str]

    def to(self, device: Any, **options: Any) -> Any:
        self.places = [*vars(self).get("places", []), str(device)]
        return super().to(device, **options)


class Adversaries(Model):
    """Manual optimization with two optimizers and two backward passes in a step, the second after a step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            loss = F.cross_entropy(self.net.head(self(batch[0])) * self.net.scale, batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        net = self.net
        return [
            torch.optim.SGD(net.blocks.parameters(), lr=0.1, momentum=0.9),
            torch.optim.SGD([*net.head.parameters(), net.scale], lr=0.1),
        ]


class Runs:
    """Every case; each returns what rank 0 writes down."""

    def __init__(self, folder: Path, ranks: int, accelerator: str) -> None:
        self.folder, self.ranks, self.accelerator = folder, ranks, accelerator
        self.found: dict[str, Any] = {}

    def trainer(self, strategy: Any, **options: Any) -> fulmen.Trainer:
        return fulmen.Trainer(**{
            "accelerator": self.accelerator, "devices": self.ranks, "strategy": strategy, "max_epochs": EPOCHS,
            "default_root_dir": self.folder, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
            "accumulate_grad_batches": WINDOW, "gradient_clip_val": 0.4, **options,
        })  # fmt: skip

    def loader(self, window: int = WINDOW) -> Any:
        """Every update sees all samples, whichever rank reads which."""
        return DataLoader(samples(), batch_size=SAMPLES // window // self.ranks)

    def fit(self, strategy: Any, model: Model | None = None, ckpt_path: Any = None, **options: Any) -> dict[str, Any]:
        model = Model() if model is None else model
        trainer = self.trainer(strategy, **options)
        trainer.fit(model, self.loader(options.get("accumulate_grad_batches", WINDOW)), ckpt_path=ckpt_path)
        loss = trainer.callback_metrics.get("loss")
        return {
            "state": whole(trainer), "norms": model.norms, "loss": None if loss is None else float(loss),
            "facts": model.facts, "trainer": trainer, "model": model,
        }  # fmt: skip

    def note(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        self.found[name] = {key: value for key, value in result.items() if key not in ("trainer", "model")}
        return result

    # -- the cases ----------------------------------------------------------------------------------------------------

    def matrix(self) -> None:
        for precision in PRECISIONS:
            if self.ranks == 1:
                self.note(f"one {precision}", self.fit("auto", precision=precision))
            else:
                self.note(f"ddp {precision}", self.fit("ddp", precision=precision))
            self.note(f"fsdp {precision}", self.fit(blocks(), precision=precision))
            self.note(f"fabric {precision}", self.by_fabric(precision))

    def by_fabric(self, precision: str) -> dict[str, Any]:
        fabric = fulmen.Fabric(accelerator=self.accelerator, devices=self.ranks, strategy=blocks(), precision=precision)
        fabric.launch()
        torch.manual_seed(0)
        # As a Trainer calls configure_model: a GPU, or another dtype in older torch, draws other numbers from the seed.
        with fabric.init_module(empty_init=False):
            net = Net()
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9))
        loader = fabric.setup_dataloaders(self.loader())
        norms: list[float] = []
        largest: list[float] = []
        for _ in range(EPOCHS):
            for index, (x, y) in enumerate(loader):
                with fabric.no_backward_sync(model, enabled=index + 1 < WINDOW):
                    output = model(x)
                    fabric.backward(F.cross_entropy(output, y) / WINDOW)
            largest.append(float(fabric.clip_gradients(model, optimizer, max_norm=1e9, norm_type=float("inf"))))
            norms.append(float(fabric.clip_gradients(model, optimizer, max_norm=0.4)))
            optimizer.step()
            optimizer.zero_grad()
        state = fabric.strategy.module_state(model.placed, full=True)
        facts = {"output": str(output.dtype), "kind": fabric.strategy.state_kind, "largest": largest}
        return {"state": {f"net.{name}": value for name, value in state.items()}, "norms": norms, "facts": facts}

    def kinds(self) -> None:
        """Everything that must not change the numbers."""
        ranks = self.ranks
        halves = (ranks // 2, 2) if ranks > 1 else (1, 1)
        for name, strategy, model in (
            ("one unit", "fsdp", Model()),
            ("by function", FSDPStrategy(auto_wrap_policy=lambda module: isinstance(module, Block)), Model()),
            ("by wrap", FSDPStrategy(), Model(wraps=True)),
            ("SHARD_GRAD_OP", blocks(sharding_strategy="SHARD_GRAD_OP"), Model()),
            ("NO_SHARD", blocks(sharding_strategy="NO_SHARD"), Model()),
            ("HYBRID_SHARD", blocks(sharding_strategy="HYBRID_SHARD"), Model()),
            (
                "mesh",
                blocks(sharding_strategy="HYBRID_SHARD", device_mesh=halves),
                Model(),
            ),
            ("each", blocks(reduce_accumulated="each"), Model()),
            ("recomputed", blocks(activation_checkpointing_policy={Block}), Model()),
            ("prefetched", blocks(forward_prefetch=True), Model()),
            ("meta", blocks(), Model(on_meta=True)),
            ("adam", blocks(), Adam()),
            ("by value", blocks(), Model()),
            ("manual", blocks(), Adversaries()),
        ):
            options: dict[str, Any] = {}
            if name == "by value":
                options = {"gradient_clip_algorithm": "value", "gradient_clip_val": 0.01}
            if name == "manual":
                options = {"accumulate_grad_batches": 1, "gradient_clip_val": None}
            result = self.fit(strategy, model, **options)
            units = [n for n, one in result["trainer"].model.named_modules() if isinstance(one, FSDPModule)]
            result["facts"] = {**result["facts"], "units": units, "names": list(model.state_dict())}
            self.note(name, result)
            if ranks == 1 and name in ("adam", "by value", "manual"):
                self.note(f"one {name}", self.fit("auto", type(model)(), **options))

    def half(self) -> None:
        """Weights gathered in bfloat16 by the user's own policy, and float16 with a scaler."""
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        self.note("own policy", self.fit(blocks(mixed_precision=policy)))
        self.note("16-mixed", self.fit(blocks(), precision="16-mixed"))
        if self.ranks == 1:
            self.note("one 16-mixed", self.fit("auto", precision="16-mixed"))

    def offloaded(self) -> None:
        seen: dict[str, str] = {}

        class Watching(Adam):
            def on_before_optimizer_step(self, optimizer: Any) -> None:
                seen["gradients"] = str(next(self.parameters()).grad.device.type)  # type: ignore[union-attr]  # known to be there

        model = Watching()
        model.metric = torchmetrics.MeanMetric()
        result = self.fit("fsdp_cpu_offload", model)
        optimizer = result["trainer"].optimizers[0]
        state = next(iter(optimizer.state.values()))
        seen |= {
            "parameters": next(model.parameters()).device.type, "optimizer": state["exp_avg"].device.type,
            "buffers": model.net.seen.device.type,
            "metric": model.metric.device.type,
        }  # fmt: skip
        self.note("offloaded", {**result, "facts": seen})

    def evaluation(self) -> None:
        model = Model()
        model.metric = WatchedMetric()
        trainer = self.trainer(blocks(), max_epochs=1)
        trainer.fit(model, self.loader(), self.loader())
        facts = {"in fit": dict(model.facts)}
        trained = whole(trainer)
        results = trainer.validate(model, self.loader(), verbose=False)
        facts["alone"] = dict(model.facts)
        facts["val"] = results[0]["val"]
        facts["predicted"] = len(trainer.predict(model, self.loader()))
        with torch.no_grad():  # a callback may call the module itself
            facts["direct"] = tuple(model(torch.zeros(2, 6, device=model.device)).shape)
        with trainer.strategy.gathered(model), torch.no_grad():
            facts["gathered"] = tuple(model.net.head(torch.zeros(2, 6, device=model.device)).shape)
        facts["sharded after"] = all(hasattr(one, "placements") for one in model.parameters())
        facts["metric was moved to"] = model.metric.places
        facts["device"] = str(next(model.parameters()).device.type)
        facts["unchanged"] = all(torch.equal(value, trained[name]) for name, value in whole(trainer).items())
        self.found["evaluation"] = facts

    def checkpoints(self) -> None:
        """Save in every way that there is here, then load all that is in the folder into every strategy there is."""
        for name, make in self.savers().items():
            result = self.fit(make(), Adam(), max_epochs=2)
            path = self.folder / f"{self.ranks} {name}.ckpt"
            result["trainer"].save_checkpoint(path)
            self.note(f"saved {path.stem}", {"state": result["state"], "is folder": path.is_dir()})
        for path in sorted(self.folder.glob("*.ckpt")):
            for name, make in self.savers().items():
                model = Adam()
                trainer = self.trainer(make())
                trainer.validate(model, self.loader(), ckpt_path=path, verbose=False)
                loaded = whole(trainer)
                result = self.fit(make(), Adam(), ckpt_path=path)
                self.note(f"{path.stem} in {self.ranks} {name}", {"loaded": loaded, "state": result["state"]})

    def savers(self) -> dict[str, Any]:
        kinds: dict[str, Any] = {
            "full": lambda: blocks(state_dict_type="full"),
            "sharded": lambda: blocks(state_dict_type="sharded"),
        }
        return {"one": lambda: "auto", **kinds} if self.ranks == 1 else {"ddp": DDPStrategy, **kinds}

    def exact(self) -> None:
        """Stopping and going on changes no bit, in weights and in optimizer state."""
        for kind in ("full", "sharded"):
            straight = self.fit(blocks(state_dict_type=kind), Adam())
            first = self.fit(blocks(state_dict_type=kind), Adam(), max_epochs=2)
            path = self.folder / f"exact {kind} {self.ranks}"
            first["trainer"].save_checkpoint(path)
            resumed = self.fit(blocks(state_dict_type=kind), Adam(), ckpt_path=path)
            states = [optimizer_state(each["trainer"]) for each in (straight, resumed)]
            self.found[f"exact {kind}"] = {
                "weights": [straight["state"], resumed["state"]], "optimizers": states,
            }  # fmt: skip

    def fabric_checkpoints(self) -> None:
        for kind in ("full", "sharded"):
            path = self.folder / f"fabric {kind} {self.ranks}"
            saved = self.fabric_model(kind)
            saved[0].save(path, {"model": saved[1], "optimizer": saved[2], "step": 3})
            for other in ("full", "sharded"):
                fabric, model, optimizer = self.fabric_model(other, seed=5)
                state = {"model": model, "optimizer": optimizer, "step": 0}
                fabric.load(path, state)
                pair = (saved, (fabric, model))
                self.found[f"fabric {kind} to {other}"] = {
                    "step": state["step"],
                    "is folder": path.is_dir(),
                    "weights": [one[0].strategy.module_state(one[1].placed, full=True) for one in pair],
                    "optimizers": [
                        one[0].strategy.optimizer_state(one[1].placed, one[2].optimizer, full=True)
                        for one in (saved, (fabric, model, optimizer))
                    ],
                }  # fmt: skip

    def fabric_model(self, kind: Any, seed: int = 0) -> Any:
        fabric = fulmen.Fabric(accelerator=self.accelerator, devices=self.ranks, strategy=blocks(state_dict_type=kind))
        fabric.launch()
        torch.manual_seed(seed)
        with fabric.init_module(empty_init=False):
            net = Net()
        model = fabric.setup_module(net)
        optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.1))
        x, y = (tensor.to(fabric.device) for tensor in samples().tensors)
        fabric.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        return fabric, model, optimizer


def blocks(**options: Any) -> FSDPStrategy:
    return FSDPStrategy(auto_wrap_policy={Block}, **options)


def whole(trainer: fulmen.Trainer) -> dict[str, torch.Tensor]:
    backend, placed = trainer.strategy.backend, trainer.strategy.model
    if hasattr(backend, "module_state"):
        return dict(backend.module_state(placed, full=True))
    assert trainer.lightning_module is not None
    return {name: value.detach().cpu().clone() for name, value in trainer.lightning_module.state_dict().items()}


def optimizer_state(trainer: fulmen.Trainer) -> dict[str, Any]:
    return dict(trainer.strategy.backend.optimizer_state(trainer.model, trainer.optimizers[0], full=True))


def main(folder: Path, ranks: int, accelerator: str, cases: list[str]) -> None:
    runs = Runs(folder, ranks, accelerator)
    for case in cases:
        getattr(runs, case)()
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(runs.found, folder / f"{ranks}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4].split(","))
