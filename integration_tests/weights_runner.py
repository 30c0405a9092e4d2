"""Trains with callbacks that change weights, optimizers or accumulation and prints what came out, as JSON.

``python weights_runner.py LIBRARY`` is started once for fulmen and once for Lightning; the two outputs are compared.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

if TYPE_CHECKING:
    from collections.abc import Callable


def dataset(samples: int, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(
        torch.randn(samples, 6, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    )


def model(library: Any, *, batch_norm: bool = False, schedule: str | None = None, groups: bool = False) -> Any:
    class Model(library.LightningModule):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            norm: nn.Module = nn.BatchNorm1d(8) if batch_norm else nn.Identity()
            self.backbone = nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 8))
            self.head = nn.Linear(8, 3)
            with torch.no_grad():  # equal values would be one parameter to Lightning's finetuning
                for number, parameter in enumerate(self.parameters()):
                    parameter.add_(0.01 * number)
            self.trace: list[Any] = []

        def forward(self, x: Any) -> Any:
            return self.head(torch.relu(self.backbone(x)))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.trace.append(["train", batch_idx, self.trainer.global_step, float(loss.detach())])
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.trace.append(["validate", batch_idx, float(F.cross_entropy(self(batch[0]), batch[1]))])

        def on_train_epoch_start(self) -> None:
            groups = self.trainer.optimizers[0].param_groups
            self.trace.append(["rates", *([group["lr"], len(group["params"])] for group in groups)])
            self.trace.append(["trained", [parameter.requires_grad for parameter in self.parameters()]])

        def configure_optimizers(self) -> Any:
            parts: Any = [p for p in self.parameters() if p.requires_grad]
            if groups:
                parts = [{"params": self.backbone.parameters()}, {"params": self.head.parameters(), "lr": 0.05}]
            optimizer = torch.optim.SGD(parts, lr=0.1, momentum=0.9)
            if schedule is None:
                return optimizer
            return [optimizer], [
                {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8), "interval": schedule}
            ]

    return Model()


Scenario = tuple[Any, list[Any], dict[str, Any]]
SCENARIOS: dict[str, Callable[[Any, Any], Scenario]] = {}


def scenario(function: Callable[[Any, Any], Scenario]) -> Callable[[Any, Any], Scenario]:
    SCENARIOS[function.__name__] = function
    return function


@scenario
def accumulation_by_schedule(library: Any, callbacks: Any) -> Scenario:
    return model(library), [callbacks.GradientAccumulationScheduler({1: 2, 3: 3})], {"max_epochs": 5}


@scenario
def swa_plain(library: Any, callbacks: Any) -> Scenario:
    callback = callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=0.5, annealing_epochs=2)
    return model(library, schedule="epoch"), [callback], {"max_epochs": 6}


@scenario
def swa_with_batch_norm(library: Any, callbacks: Any) -> Scenario:
    callback = callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2, annealing_epochs=3, device=None)
    return model(library, batch_norm=True), [callback], {"max_epochs": 4}


@scenario
def swa_of_groups_linear_with_a_function(library: Any, callbacks: Any) -> Scenario:
    callback = callbacks.StochasticWeightAveraging(
        swa_lrs=[0.02, 0.01],
        swa_epoch_start=2,
        annealing_epochs=0,
        annealing_strategy="linear",
        avg_fn=lambda average, weights, n: 0.75 * average + 0.25 * weights,
        device="cpu",
    )
    return model(library, groups=True), [callback], {"max_epochs": 5, "accumulate_grad_batches": 2}


@scenario
def swa_without_an_end(library: Any, callbacks: Any) -> Scenario:
    callback = callbacks.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=2)
    return model(library), [callback], {"max_epochs": -1, "max_steps": 24}


@scenario
def averaging_every_step(library: Any, callbacks: Any) -> Scenario:
    return model(library, batch_norm=True), [callbacks.WeightAveraging()], {"max_epochs": 3}


@scenario
def averaging_parameters_only_while_accumulating(library: Any, callbacks: Any) -> Scenario:
    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "val_check_interval": 3}
    return model(library, batch_norm=True), [callbacks.WeightAveraging("cpu", use_buffers=False)], options


@scenario
def averaging_by_epoch_with_own_function(library: Any, callbacks: Any) -> Scenario:
    class ByEpoch(callbacks.WeightAveraging):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
            return epoch_idx is not None and epoch_idx >= 1

    average = ByEpoch(multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))
    return model(library), [average], {"max_epochs": 4}


@scenario
def ema(library: Any, callbacks: Any) -> Scenario:
    return model(library, batch_norm=True), [callbacks.EMAWeightAveraging(decay=0.9)], {"max_epochs": 3}


@scenario
def ema_sometimes(library: Any, callbacks: Any) -> Scenario:
    callback = callbacks.EMAWeightAveraging(
        decay=0.8, update_every_n_steps=3, update_starting_at_step=5, update_starting_at_epoch=1
    )
    return model(library), [callback], {"max_epochs": 3}


@scenario
def backbone(library: Any, callbacks: Any) -> Scenario:
    callback = callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=2, verbose=True)
    return model(library, batch_norm=True), [callback], {"max_epochs": 7}


@scenario
def backbone_not_aligned(library: Any, callbacks: Any) -> Scenario:
    callback = callbacks.BackboneFinetuning(
        unfreeze_backbone_at_epoch=1,
        lambda_func=lambda epoch: 1.0 + epoch,
        backbone_initial_lr=0.03,
        should_align=False,
        train_bn=False,
    )
    return model(library, schedule="epoch"), [callback], {"max_epochs": 4}


@scenario
def finetuning_of_ones_own(library: Any, callbacks: Any) -> Scenario:
    class OneByOne(callbacks.BaseFinetuning):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze([pl_module.backbone], train_bn=False)

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch in (1, 2):
                self.unfreeze_and_add_param_group(
                    pl_module.backbone[4 - 2 * epoch], optimizer, initial_denom_lr=5.0, train_bn=True
                )

    return model(library, batch_norm=True), [OneByOne()], {"max_epochs": 4}


def pruned(amount: Any = 0.3, **options: Any) -> Callable[[Any, Any], Scenario]:
    def make(library: Any, callbacks: Any) -> Scenario:
        method = options.get("pruning_fn", "l1_unstructured")
        rest = {key: value for key, value in options.items() if key != "pruning_fn"}
        return model(library), [callbacks.ModelPruning(method, amount=amount, **rest)], {"max_epochs": 3}

    return make


class Smallest(prune.BasePruningMethod):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
    PRUNING_TYPE = "unstructured"

    def __init__(self, amount: float) -> None:
        self.amount = amount

    def compute_mask(self, t: Any, default_mask: Any) -> Any:
        mask = default_mask.clone()
        mask.view(-1)[t.abs().view(-1) < self.amount / 10] = 0
        return mask


# Lightning's layers share memory with the first values they were put back to, at least on the CPU, and train them too:
# only its first time is comparable.
ONCE: dict[str, Any] = {"apply_pruning": lambda epoch: epoch == 1}

SCENARIOS |= {
    "pruning_lottery": pruned(**ONCE, verbose=2),
    "pruning_without_lottery": pruned(use_lottery_ticket_hypothesis=False, parameter_names=["weight"], verbose=1),
    "pruning_by_number": pruned(5, use_lottery_ticket_hypothesis=lambda epoch: epoch == 1),
    "pruning_by_epoch": pruned(
        lambda epoch: 0.1 * (epoch + 1), apply_pruning=lambda epoch: epoch != 1, use_lottery_ticket_hypothesis=False
    ),
    "pruning_after_validation": pruned(prune_on_train_epoch_end=False, use_lottery_ticket_hypothesis=False),
    "pruning_by_layer": pruned(**ONCE, use_global_unstructured=False),
    "pruning_at_random": pruned(**ONCE, pruning_fn="RANDOM_UNSTRUCTURED"),
    "pruning_of_rows": pruned(
        pruning_fn="ln_structured",
        use_global_unstructured=False,
        pruning_dim=0,
        pruning_norm=1,
        parameter_names=["weight"],
        use_lottery_ticket_hypothesis=False,
    ),
    "pruning_of_random_rows": pruned(
        **ONCE, pruning_fn="random_structured", use_global_unstructured=False, pruning_dim=0, parameter_names=["weight"]
    ),
    "pruning_resampled": pruned(resample_parameters=True),
    "pruning_not_permanent": pruned(**ONCE, make_pruning_permanent=False),
    "pruning_by_a_class": pruned(0.8, pruning_fn=Smallest, use_lottery_ticket_hypothesis=False),
    "pruning_nothing": pruned(0.0),
}


@scenario
def pruning_of_chosen_layers(library: Any, callbacks: Any) -> Scenario:
    class Filtered(callbacks.ModelPruning):  # type: ignore[misc]  # the base class is chosen at run time: Lightning's or ours
        def filter_parameters_to_prune(self, parameters_to_prune: Any = ()) -> Any:
            return [pair for pair in parameters_to_prune if pair[1] == "weight"]

    module = model(library)
    chosen = [(module.backbone[0], "weight"), (module.backbone[0], "bias"), (module.head, "weight")]
    callback = Filtered("l1_unstructured", parameters_to_prune=chosen, amount=0.4, **ONCE)
    return module, [callback], {"max_epochs": 3}


def listed(state: Any) -> dict[str, list[float]]:
    return {name: value.detach().double().flatten().tolist() for name, value in sorted(state.items())}


def run(library: Any, name: str) -> dict[str, Any]:
    callbacks = importlib.import_module(f"{library.__name__}.callbacks")
    with tempfile.TemporaryDirectory() as folder:
        module, given, options = SCENARIOS[name](library, callbacks)
        torch.manual_seed(5)
        keep = callbacks.ModelCheckpoint(dirpath=folder, filename="kept", save_top_k=1)
        trainer = library.Trainer(
            accelerator="cpu",
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[*given, keep],
            **options,
        )
        trainer.fit(module, DataLoader(dataset(26), batch_size=4), DataLoader(dataset(10, 2), batch_size=5))
        saved = torch.load(keep.best_model_path, weights_only=True)
        return {
            "weights": listed(module.state_dict()),
            "trace": module.trace,
            "saved": listed(saved["state_dict"]),
            "current": listed(saved.get("current_model_state", {})),
            "averaging": listed(saved.get("averaging_state", {})),
            "counters": [trainer.global_step, trainer.current_epoch, trainer.max_epochs],
            "modes": [submodule.training for submodule in module.modules()],
            "momenta": [m.momentum for m in module.modules() if isinstance(m, nn.BatchNorm1d)],
        }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    chosen = importlib.import_module(sys.argv[1])
    Path(sys.argv[2]).write_text(json.dumps({name: run(chosen, name) for name in SCENARIOS}))
