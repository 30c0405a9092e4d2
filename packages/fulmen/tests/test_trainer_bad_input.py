"""What a call needs is checked before anything starts; each problem is one clear sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import fulmen


class Good(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(samples: int = 8) -> DataLoader[Any]:
    return DataLoader(torch.randn(samples, 4), batch_size=2)  # type: ignore[arg-type]  # torch takes any sequence; its annotation names only Dataset


def trainer(**options: Any) -> fulmen.Trainer:
    return fulmen.Trainer(**{"barebones": True, "max_epochs": 1, "accelerator": "cpu", **options})


def fails(
    model: Any, *arguments: Any, method: str = "fit", options: dict[str, Any] | None = None, **kwargs: Any
) -> str:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
        getattr(trainer(**(options or {})), method)(model, *arguments, **kwargs)
    return str(raised.value)


@pytest.mark.proves("9.20")
def test_a_model_that_is_no_lightning_module_is_refused() -> None:
    assert "model is of type Linear; the Trainer needs a LightningModule" in fails(nn.Linear(1, 1), loader())


@pytest.mark.proves("9.20")
def test_everything_that_is_missing_is_told_at_once() -> None:
    message = fails(fulmen.LightningModule())

    assert "has no training_step" in message
    assert "has no configure_optimizers" in message
    assert "has no training loader: pass train_dataloaders=" in message


@pytest.mark.proves("9.20")
def test_loaders_and_a_datamodule_together_are_refused() -> None:
    class Data(fulmen.LightningDataModule):
        def train_dataloader(self) -> Any:
            return loader()

    assert "both train_dataloaders and datamodule=Data" in fails(Good(), loader(), datamodule=Data())


@pytest.mark.proves("9.20")
def test_a_loader_that_is_not_iterable_is_named() -> None:
    assert "train_dataloader gave an object of type int, which is not iterable" in fails(Good(), 7)


@pytest.mark.proves("9.20")
def test_a_loader_hook_that_returns_nothing_is_named() -> None:
    class Forgetful(Good):
        def train_dataloader(self) -> Any:
            return None

    assert "train_dataloader returned None" in fails(Forgetful())


@pytest.mark.proves("9.20")
@pytest.mark.parametrize("samples", [0])
def test_an_empty_loader_trains_nothing_and_says_so(samples: int) -> None:
    run = trainer()

    with pytest.warns(UserWarning, match="training loader has no batch"):
        run.fit(Good(), [] if samples == 0 else loader(samples))

    assert run.global_step == 0


@pytest.mark.proves("9.20")
def test_an_endless_run_over_an_iterable_without_batches_is_an_error() -> None:
    class Nothing:
        def __iter__(self) -> Any:
            return iter(())

    message = fails(Good(), Nothing(), options={"max_epochs": -1, "max_steps": 5})

    assert "the training loader gave no batch, so training would never end" in message


@pytest.mark.proves("9.20")
def test_a_fraction_that_leaves_no_batch_is_an_error() -> None:
    message = fails(Good(), loader(), options={"limit_train_batches": 0.1})

    assert "limit_train_batches=0.1 of 4 batches is less than one batch. Give at least 0.25" in message


@pytest.mark.proves("9.20")
def test_a_fraction_of_an_unknown_length_is_an_error() -> None:
    class Endless:
        def __iter__(self) -> Any:
            while True:
                yield torch.randn(2, 4)

    assert "does not know its length. Give a number of batches" in fails(
        Good(), Endless(), options={"limit_train_batches": 0.5, "max_epochs": -1, "max_steps": 2}
    )


@pytest.mark.proves("9.20")
def test_a_validation_interval_longer_than_the_epoch_is_an_error() -> None:
    class Validated(Good):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    message = fails(Validated(), loader(), loader(), options={"val_check_interval": 9})

    assert "val_check_interval=9 is longer than the epoch of 4 batches" in message
    assert "check_val_every_n_epoch=None" in message


@pytest.mark.proves("10.10")
@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("adam", "configure_optimizers returned"),
        ({"lr_scheduler": None}, "optimizer"),
        (7, "configure_optimizers returned"),
    ],
)
def test_a_wrong_return_of_configure_optimizers_is_named_with_the_allowed_forms(returned: Any, says: str) -> None:
    class Wrong(Good):
        def configure_optimizers(self) -> Any:
            return returned

    message = fails(Wrong(), loader())

    assert says in message
    assert "Allowed are" in message or "optimizer" in message


@pytest.mark.proves("10.12")
def test_several_optimizers_need_manual_optimization() -> None:
    class Two(Good):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.2)]

    assert "automatic_optimization = False" in fails(Two(), loader())


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ("loss", "training_step returned str; return a loss tensor"),
        ({"accuracy": torch.ones(())}, "none of which is 'loss'"),
        ({"loss": 1.0}, "'loss' of type float; it must be a tensor"),
    ],
)
def test_a_wrong_return_of_training_step_is_named(returned: Any, says: str) -> None:
    class Wrong(Good):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return returned

    assert says in fails(Wrong(), loader())


def test_a_batch_of_the_wrong_type_ends_in_the_users_own_error_with_the_place_noted() -> None:
    with pytest.raises(TypeError) as raised:
        trainer().fit(Good(), ["text", "text"])

    assert any("in fit, rank 0, epoch 0, batch 0" in note for note in raised.value.__notes__)


@pytest.mark.proves("9.14")
def test_flags_that_manual_optimization_cannot_honour_are_refused() -> None:
    class Manual(Good):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    message = fails(Manual(), loader(), options={"gradient_clip_val": 1.0, "accumulate_grad_batches": 2})

    assert "gradient_clip_val=1.0 cannot work with automatic_optimization=False" in message
    assert "accumulate_grad_batches=2 cannot work with automatic_optimization=False" in message


@pytest.mark.proves("11.1")
def test_a_misspelt_hook_of_a_callback_is_named_with_the_nearest_hook() -> None:
    class Misspelt(fulmen.Callback):
        def on_train_bach_end(self, *_: Any) -> None:
            pass

    message = fails(Good(), loader(), options={"callbacks": [Misspelt()]})

    assert (
        "Misspelt defines 'on_train_bach_end', which is no hook of a callback. Did you mean 'on_train_batch_end'?"
        in (message)
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [("on_epoch_end", "on_train_epoch_end, on_validation_epoch_end"), ("on_batch_start", "on_train_batch")],
)
def test_a_hook_of_lightning_before_2_is_named_with_what_took_its_place(old: str, new: str) -> None:
    callback = type("Old", (fulmen.Callback,), {old: lambda *_: None})()

    message = fails(Good(), loader(), options={"callbacks": [callback]})

    assert f"Old defines {old!r}, which is no hook of a callback. Use {new}" in message


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("EarlyStopping", "callbacks holds 'EarlyStopping', which has no hook."),
        ([3, fulmen.Callback()], "callbacks holds 3, which has no hook."),
        ([fulmen.Callback], "callbacks holds the class Callback, not an instance."),
    ],
)
def test_what_is_no_callback_is_refused_when_the_trainer_is_made(given: Any, says: str) -> None:
    with pytest.raises(ValueError, match=r"Give an object whose class derives from fulmen\.Callback") as raised:
        trainer(callbacks=given)

    assert says in str(raised.value)


def test_a_hook_with_too_few_arguments_is_named_with_those_it_gets() -> None:
    class Short:
        def on_train_batch_end(self, trainer: Any, pl_module: Any) -> None:
            pass

    message = fails(Good(), loader(), options={"callbacks": [Short()]})

    assert "Short.on_train_batch_end must take (trainer, pl_module, outputs, batch, batch_idx)" in message


@pytest.mark.proves("9.30")
def test_several_validation_loaders_need_a_step_that_takes_dataloader_idx() -> None:
    class Validated(Good):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    assert "validation_step does not take dataloader_idx" in fails(Validated(), loader(), [loader(), loader()])


@pytest.mark.proves("9.30")
def test_one_validation_loader_refuses_a_required_dataloader_idx() -> None:
    class Validated(Good):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            pass

    assert "requires dataloader_idx. Give it a default" in fails(Validated(), loader(), loader())


@pytest.mark.proves("9.54")
@pytest.mark.parametrize("gone", ["training_epoch_end", "validation_epoch_end", "training_step_end"])
def test_hooks_that_no_longer_exist_are_refused_with_what_replaces_them(gone: str) -> None:
    class Old(Good):
        pass

    setattr(Old, gone, lambda self, outputs: None)

    assert f"defines {gone}, which is no longer called. Use" in fails(Old(), loader())


@pytest.mark.proves("9.20")
def test_validate_and_test_name_the_missing_step_and_loader() -> None:
    assert "has no validation_step" in fails(Good(), method="validate")
    assert "trainer.test() has no loader: pass dataloaders=" in fails(Good(), method="test")


@pytest.mark.proves("9.20")
def test_a_call_without_a_model_on_a_new_trainer_says_what_to_pass() -> None:
    with pytest.raises(TypeError, match=r"trainer.test\(\) was called without a model"):
        trainer().test()


@pytest.mark.proves("5.29")
def test_best_and_last_checkpoints_that_do_not_exist_are_explained() -> None:
    run = trainer()
    with pytest.raises(ValueError, match="there is no checkpoint callback"):
        run.fit(Good(), loader(), ckpt_path="best")


def test_a_checkpoint_callback_contradicts_enable_checkpointing_false() -> None:
    from fulmen.callbacks import ModelCheckpoint

    with pytest.raises(ValueError, match="ModelCheckpoint, but enable_checkpointing=False"):
        fulmen.Trainer(callbacks=[ModelCheckpoint()], enable_checkpointing=False, logger=False, max_epochs=1)


@pytest.mark.proves("10.6")
def test_an_overridden_optimizer_step_must_run_its_closure() -> None:
    class Lazy(Good):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.optimizer.step()

    assert "did not run its closure" in fails(Lazy(), loader())


@pytest.mark.proves("5.10")
def test_save_checkpoint_before_there_is_a_model_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"save_checkpoint\(\) needs a model"):
        trainer().save_checkpoint("x.ckpt")


@pytest.mark.proves("4.33")
@pytest.mark.parametrize("name", ["dp", "DP"])
def test_a_strategy_of_fabric_alone_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"strategy='{name}' is for Fabric only: .* Use strategy='ddp'"):
        trainer(strategy=name)
