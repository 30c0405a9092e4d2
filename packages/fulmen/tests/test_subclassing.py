"""What people derive from goes on being called; what a port from Lightning brings along in vain is said."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fulmen
from fulmen.callbacks import ModelCheckpoint
from fulmen.plugins import CheckpointIO, FullPrecision, Precision
from fulmen.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from fulmen_fabric import PossibleUserWarning
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch.optim import Optimizer

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "max_epochs": 1,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Line(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("seen", batch[0].mean())

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2, num_workers=0)


@pytest.mark.proves("A.8")
def test_methods_that_lightning_calls_on_a_strategy_and_nobody_calls_here_are_named() -> None:
    class Ported(SingleDeviceStrategy):
        def setup(self, trainer: Any) -> None: ...

        def training_step(self, *args: Any) -> Any: ...

        def place(self, module: nn.Module) -> nn.Module:  # this one is called
            placed.append(module)
            return super().place(module)

    placed: list[nn.Module] = []
    with pytest.warns(PossibleUserWarning, match=r"Ported defines setup, training_step, .*strategy.*nothing happens"):
        trainer = fulmen.Trainer(strategy=Ported(), enable_checkpointing=False, **QUIET)

    model = Line()
    trainer.fit(model, loader())
    assert placed == [model]


@pytest.mark.proves("A.8")
@pytest.mark.parametrize("base", [SingleDeviceStrategy, DDPStrategy, Strategy])
def test_a_strategys_step_with_lightnings_arguments_is_refused_with_ours(base: type) -> None:
    class Ported(base):  # type: ignore[misc]  # the base is a parameter
        root_device = torch.device("cpu")

        def optimizer_step(self, optimizer: Any, closure: Any, model: Any = None, **kwargs: Any) -> Any: ...

    with pytest.raises(
        MisconfigurationException, match=r"optimizer_step\(self, optimizer.*def optimizer_step\(self, o"
    ):
        fulmen.Trainer(strategy=Ported(), devices=1, **QUIET)


@pytest.mark.proves("A.8")
def test_a_backward_with_lightnings_arguments_is_refused_with_ours() -> None:
    class Ported(SingleDeviceStrategy):
        def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor: ...

    with pytest.raises(MisconfigurationException, match=r"Lightning's arguments.*def backward\(self, loss, module"):
        fulmen.Trainer(strategy=Ported(), **QUIET)


@pytest.mark.proves("A.8")
def test_a_strategy_with_members_of_its_own_is_left_alone() -> None:
    class Vendors:  # derives from nothing of ours: its names are its own
        root_device = torch.device("cpu")

        def setup(self, trainer: Any) -> None: ...

        def setup_environment(self, topology: Any) -> None: ...

        def module_context(self, *, empty: bool) -> Any:
            return torch.device("cpu")

        def place(self, module: nn.Module) -> nn.Module:
            return module

        def prepare_optimizers(self, module: nn.Module, optimizers: Any) -> Any:
            return optimizers

        def teardown(self) -> None: ...

    fulmen.Trainer(strategy=Vendors(), enable_checkpointing=False, **QUIET).fit(Line(), loader())


@pytest.mark.proves("A.8")
def test_a_precision_of_ones_own_converts_inputs_and_hears_what_is_not_called() -> None:
    class Doubling(FullPrecision):
        def convert_input(self, data: Any) -> Any:
            return [data[0] * 2]

        def optimizer_step(self, *args: Any, **kwargs: Any) -> Any: ...

    with pytest.warns(PossibleUserWarning, match="Doubling defines optimizer_step, .*precision"):
        trainer = fulmen.Trainer(plugins=Doubling(), **QUIET)
    assert trainer.test(Line(), loader(), verbose=False) == [{"seen": 2.0}]


@pytest.mark.proves("A.8")
def test_a_precision_that_only_inherits_declarations_is_refused() -> None:
    class Ported(Precision):
        precision = "32-true"

    with pytest.raises(MisconfigurationException, match=r"plugins=Ported: it inherits plan, convert_module.*FullPrec"):
        fulmen.Trainer(plugins=[Ported()], **QUIET)


@pytest.mark.proves("A.8")
def test_a_checkpoint_io_needs_only_the_methods_that_lightnings_has(tmp_path: Path) -> None:
    class Plain(CheckpointIO):
        def save_checkpoint(self, checkpoint: Mapping[str, object], path: Any, storage_options: Any = None) -> None:
            torch.save(dict(checkpoint), path)

        def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
            loaded.append(path)
            return torch.load(path, weights_only=True)

        def remove_checkpoint(self, path: Any) -> None: ...

    loaded: list[Any] = []
    trainer = fulmen.Trainer(plugins=Plain(), callbacks=ModelCheckpoint(tmp_path), **QUIET)
    trainer.fit(Line(), loader())
    assert trainer.checkpoint_callback is not None
    best = trainer.checkpoint_callback.best_model_path

    trainer.test(Line(), loader(), ckpt_path="best", verbose=False)
    assert loaded == [best]


@pytest.mark.proves("A.8")
def test_model_checkpoint_and_trainer_call_what_their_subclasses_override(tmp_path: Path) -> None:
    class Keeps(ModelCheckpoint):
        def _monitor_candidates(self, trainer: Any) -> dict[str, Tensor]:
            return super()._monitor_candidates(trainer) | {"extra": torch.tensor(0.25)}

        def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)
            saved.append(filepath)

    class Counting(fulmen.Trainer):
        def __init__(self, *, offset: int, **options: Any) -> None:
            super().__init__(**options)
            self.offset = offset

        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            calls.append(self.offset)
            super().save_checkpoint(*args, **kwargs)

    saved: list[str] = []
    calls: list[int] = []
    trainer = Counting(offset=3, callbacks=Keeps(tmp_path, monitor="extra", filename="{extra:.2f}"), **QUIET)
    trainer.fit(Line(), loader())

    assert [path.rpartition("/")[2] for path in saved] == ["extra=0.25.ckpt"]
    assert calls == [3]


@pytest.mark.proves("9.44", "A.1")
def test_the_strategy_answers_isinstance_for_the_backend_and_survives_copies() -> None:
    trainer = fulmen.Trainer(enable_checkpointing=False, **QUIET)

    def kinds(strategy: object) -> list[bool]:
        return [isinstance(strategy, kind) for kind in (SingleDeviceStrategy, Strategy, DDPStrategy)]

    copies: list[Callable[[Any], Any]] = [lambda it: it, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))]
    for copied in copies:
        again = copied(trainer)
        assert kinds(again.strategy) == [True, True, False]
        assert again.strategy.root_device == torch.device("cpu")
        again.fit(Line(), loader())
        assert again.strategy.lightning_module is again.lightning_module


@pytest.mark.proves("9.44", "A.1")
def test_the_strategy_answers_under_lightnings_names() -> None:
    class Reads(fulmen.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            strategy = trainer.strategy
            [optimizer] = strategy.optimizers
            seen.update(
                module=strategy.lightning_module is pl_module,
                name=strategy.strategy_name,
                launcher=strategy.launcher,
                accelerator=strategy.accelerator is trainer.accelerator,
                precision=strategy.precision_plugin is trainer.precision_plugin,
                devices=strategy.parallel_devices,
                counts=(strategy.num_nodes, strategy.num_processes, strategy.world_size),
                sampler=strategy.distributed_sampler_kwargs,
                flags=(
                    strategy.restore_checkpoint_after_setup,
                    strategy.lightning_restore_optimizer,
                    strategy.handles_gradient_accumulation,
                ),
                weights=strategy.lightning_module_state_dict().keys(),
                state=strategy.optimizer_state(optimizer)["param_groups"][0]["lr"],
                wrapped=strategy.optimizer_state(pl_module.optimizers())["param_groups"][0]["lr"],
                moved=strategy.batch_to_device({"a": [torch.ones(1)]})["a"][0].device.type,
                loader=strategy.process_dataloader(trainer.train_dataloader) is trainer.train_dataloader,
            )
            with pytest.raises(MisconfigurationException, match=r"optimizer_state\(Adam\): this fit trains with SGD"):
                strategy.optimizer_state(torch.optim.Adam(pl_module.parameters()))

    seen: dict[str, Any] = {}
    trainer = fulmen.Trainer(enable_checkpointing=False, callbacks=Reads(), **QUIET)
    with pytest.raises(MisconfigurationException, match=r"lightning_module_state_dict.*Call fit"):
        trainer.strategy.lightning_module_state_dict()
    trainer.fit(Line(), loader())

    assert seen == {
        "module": True, "name": "single_device", "launcher": None, "accelerator": True, "precision": True,
        "devices": [torch.device("cpu")], "counts": (1, 1, 1), "sampler": {"num_replicas": 1, "rank": 0},
        "flags": (False, True, False), "weights": {"layer.weight", "layer.bias"}, "state": 0.1, "wrapped": 0.1,
        "moved": "cpu", "loader": True,
    }  # fmt: skip


@pytest.mark.proves("A.6")
def test_the_training_data_can_be_asked_for_before_optimizers_are_made() -> None:
    class Counts(Line):
        def configure_optimizers(self) -> Optimizer:
            before = self.trainer.num_training_batches
            self.trainer.fit_loop.setup_data()
            seen.append((before, self.trainer.num_training_batches, len(self.trainer.train_dataloader)))
            return super().configure_optimizers()

    seen: list[Any] = []
    fulmen.Trainer(enable_checkpointing=False, **QUIET).fit(Counts(), loader())
    assert seen == [(float("inf"), 2, 2)]
