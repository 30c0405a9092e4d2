"""save_hyperparameters and what checkpoints and loggers get from it."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import threading
from argparse import Namespace
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fulmen.datamodule import LightningDataModule
from fulmen.hparams import (
    AttributeDict,
    checkpoint_entries,
    drop_unpicklable,
    hyperparameters_for_loggers,
    load_hparams_from_csv,
    load_hparams_from_yaml,
)
from fulmen.loggers import CSVLogger
from fulmen.module import LightningModule
from fulmen.trainer import Trainer
from fulmen_protocols import MisconfigurationException

if TYPE_CHECKING:
    from pathlib import Path


class Plain(LightningModule):
    def __init__(self, lr: float = 0.1, width: int = 3, *rest: Any, name: str = "n", **more: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.proves("5.34")
def test_all_arguments_are_saved_with_defaults_and_keywords() -> None:
    assert Plain(0.5, 4, "dropped", extra=True).hparams == {"lr": 0.5, "width": 4, "name": "n", "extra": True}


def test_a_value_is_read_as_it_is_when_it_is_saved() -> None:
    class Late(LightningModule):
        def __init__(self, width: int) -> None:
            super().__init__()
            width = width * 2
            self.save_hyperparameters()

    assert Late(3).hparams.width == 6


@pytest.mark.proves("5.34")
def test_names_choose_and_ignore_leaves_out() -> None:
    class Chosen(LightningModule):
        def __init__(self, a: int, b: int, c: int, how: str) -> None:
            super().__init__()
            if how == "names":
                self.save_hyperparameters("a", "c")
            elif how == "one":
                self.save_hyperparameters(ignore="a")
            else:
                self.save_hyperparameters(ignore=["a", "how"])

    assert Chosen(1, 2, 3, "names").hparams == {"a": 1, "c": 3}
    assert Chosen(1, 2, 3, "one").hparams == {"b": 2, "c": 3, "how": "one"}
    assert Chosen(1, 2, 3, "list").hparams == {"b": 2, "c": 3}


def test_a_name_that_is_no_argument_is_refused_with_the_nearest() -> None:
    class Wrong(LightningModule):
        def __init__(self, learning_rate: float) -> None:
            super().__init__()
            self.save_hyperparameters("learning_rat")

    with pytest.raises(MisconfigurationException, match="Did you mean 'learning_rate'"):
        Wrong(0.1)


@pytest.mark.proves("5.34")
def test_arguments_of_subclasses_are_saved_and_win() -> None:
    class Base(LightningModule):
        def __init__(self, lr: float, depth: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Sub(Base):
        def __init__(self, lr: float, heads: int) -> None:
            super().__init__(lr * 2)

    assert Sub(0.1, 8).hparams == {"lr": 0.1, "heads": 8, "depth": 1}


@pytest.mark.proves("5.34")
def test_ignore_in_a_subclass_removes_what_the_base_saved() -> None:
    class Base(LightningModule):
        def __init__(self, lr: float, secret: str) -> None:
            super().__init__()
            self.save_hyperparameters()

    class Sub(Base):
        def __init__(self, lr: float, secret: str) -> None:
            super().__init__(lr, secret)
            self.save_hyperparameters(ignore="secret")

    module = Sub(0.1, "x")
    assert module.hparams == {"lr": 0.1}
    assert module.hparams_initial == {"lr": 0.1}


def test_a_module_made_inside_another_does_not_get_its_arguments() -> None:
    class Outer(LightningModule):
        def __init__(self, outer: int) -> None:
            super().__init__()
            self.inner = Plain(lr=1.0)
            self.save_hyperparameters()

    module = Outer(7)
    assert module.hparams == {"outer": 7}
    assert "outer" not in module.inner.hparams


def test_decorated_constructors_and_helpers_are_seen_through() -> None:
    def decorate(init: Any) -> Any:
        @functools.wraps(init)
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)

        return wrapper

    class Base(LightningModule):
        @decorate
        def __init__(self, lr: float) -> None:
            super().__init__()
            self._remember()

        def _remember(self) -> None:
            self.save_hyperparameters()

    class Sub(Base):
        def __init__(self, lr: float, width: int) -> None:
            super().__init__(lr)

    assert Sub(0.1, 2).hparams == {"lr": 0.1, "width": 2}


@dataclass(eq=False)
class DataclassModule(LightningModule):
    lr: float
    sizes: list[int] = field(default_factory=lambda: [1, 2])

    def __post_init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.proves("5.34")
def test_dataclass_modules_save_their_fields() -> None:
    assert DataclassModule(0.3).hparams == {"lr": 0.3, "sizes": [1, 2]}


@dataclass
class Settings:
    lr: float = 0.1
    depth: int = 2


@pytest.mark.proves("5.34")
@pytest.mark.parametrize(
    "config", [{"lr": 0.1, "depth": 2}, Namespace(lr=0.1, depth=2), Settings(), AttributeDict(lr=0.1, depth=2)]
)
def test_one_configuration_object_becomes_the_hyperparameters(config: Any) -> None:
    class Configured(LightningModule):
        def __init__(self, other: int, config: Any) -> None:
            super().__init__()
            self.save_hyperparameters(config)

    module = Configured(1, config)
    assert module.hparams == {"lr": 0.1, "depth": 2}
    assert module.hparams.depth == 2
    assert checkpoint_entries(module) == {"hparams_name": "config", "hyper_parameters": {"lr": 0.1, "depth": 2}}


@pytest.mark.parametrize("config", [3, [1, 2], None])
def test_other_objects_are_refused_as_configuration(config: Any) -> None:
    with pytest.raises(MisconfigurationException, match="Give a mapping"):
        LightningModule().save_hyperparameters(config)


def test_hyperparameters_can_be_given_outside_of_a_constructor() -> None:
    module = LightningModule()
    module.save_hyperparameters({"lr": 1.0})
    module.save_hyperparameters({"depth": 2})

    assert module.hparams == {"lr": 1.0, "depth": 2}


@pytest.mark.proves("5.34")
def test_a_frame_says_whose_arguments_are_meant() -> None:
    class Helped(LightningModule):
        def __init__(self, lr: float, depth: int = 2) -> None:
            super().__init__()
            remember(self, inspect.currentframe())

    def remember(module: LightningModule, frame: Any) -> None:
        lr = "the helper's own"
        assert lr
        module.save_hyperparameters(frame=frame)

    assert Helped(0.5).hparams == {"lr": 0.5, "depth": 2}


@pytest.mark.proves("5.34")
def test_what_cannot_be_pickled_goes_when_a_fit_starts_and_a_key_of_both_is_an_error_there(tmp_path: Path) -> None:
    class Tiny(LightningModule):
        def __init__(self, lock: Any = None, seed: int = 1) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Loads(Data):
        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.ones(2, 1))

    def run(logger: Any = False) -> Trainer:
        return Trainer(
            accelerator="cpu", max_epochs=1, logger=logger, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip

    trainer = run()
    with pytest.warns(UserWarning, match="'lock' cannot be pickled"):
        trainer.fit(Tiny(threading.Lock()), datamodule=Loads())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["hyper_parameters"] == {"seed": 1}

    with pytest.raises(MisconfigurationException, match=r"'seed' is 1 in Tiny and 2 in Loads.*logger=False"):
        run(CSVLogger(tmp_path)).fit(Tiny(), datamodule=Loads(seed=2))


@pytest.mark.proves("5.34")
def test_the_initial_values_do_not_follow_changes() -> None:
    module = Plain(rest=[1])
    module.hparams.lr = 9.0
    module.hparams["rest"].append(2)

    assert module.hparams_initial["lr"] == 0.1
    assert module.hparams_initial["rest"] == [1]
    module.hparams_initial["lr"] = 5.0
    assert module.hparams_initial["lr"] == 0.1


@pytest.mark.proves("5.34")
def test_a_module_as_value_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"save_hyperparameters\(ignore=\['backbone'\]\)"):
        Plain(backbone=nn.Linear(1, 1))


@pytest.mark.proves("5.34")
def test_what_cannot_be_pickled_is_dropped_with_a_warning() -> None:
    module = Plain(lock=threading.Lock(), kept=1)

    with pytest.warns(UserWarning, match="'lock' cannot be pickled"):
        drop_unpicklable(module)

    assert "lock" not in module.hparams
    assert "lock" not in module.hparams_initial
    assert module.hparams.kept == 1


def test_a_class_that_saves_nothing_adds_nothing_to_a_checkpoint() -> None:
    assert checkpoint_entries(LightningModule()) == {}


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 2, **more: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_data_modules_use_keys_of_their_own() -> None:
    assert checkpoint_entries(Data(), "datamodule_") == {
        "datamodule_hparams_name": "kwargs",
        "datamodule_hyper_parameters": {"batch_size": 2},
    }


def test_loggers_get_both_and_equal_values_may_meet() -> None:
    module = Plain(seed=torch.ones(2))

    merged = hyperparameters_for_loggers(module, Data(seed=torch.ones(2)))

    assert merged is not None
    assert merged["batch_size"] == 2
    assert merged["lr"] == 0.1


@pytest.mark.proves("5.34")
def test_the_same_key_with_other_values_is_an_error() -> None:
    with pytest.raises(MisconfigurationException, match=r"'lr' is 0\.1 in Plain and 0\.2 in Data"):
        hyperparameters_for_loggers(Plain(), Data(lr=0.2))


def test_loggers_get_nothing_if_asked_so() -> None:
    class Quiet(LightningModule):
        def __init__(self, lr: float = 0.1) -> None:
            super().__init__()
            self.save_hyperparameters(logger=False)

    assert hyperparameters_for_loggers(Quiet()) is None
    assert hyperparameters_for_loggers(LightningModule(), None) is None


def test_attribute_dict_is_a_dict_with_attributes() -> None:
    hparams = AttributeDict(lr=0.1)
    hparams.depth = 2
    del hparams.lr

    assert hparams == {"depth": 2}
    assert copy.deepcopy(hparams).depth == pickle.loads(pickle.dumps(hparams)).depth == 2
    assert copy.copy(hparams) is not hparams
    assert isinstance(copy.copy(hparams), AttributeDict)
    with pytest.raises(AttributeError, match="Did you mean 'depth'"):
        _ = hparams.dept
    assert repr(AttributeDict(lr=0.1, depth=2)) == "lr:    0.1\ndepth: 2"


def test_files_of_hyperparameters_are_read(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "h.yaml").write_text("lr: 0.1\nsizes: [1, 2]\n")
    (tmp_path / "h.csv").write_text('key,value\nlr,0.1\nname,resnet\nsizes,"[1, 2]"\n')

    assert load_hparams_from_yaml(tmp_path / "h.yaml") == {"lr": 0.1, "sizes": [1, 2]}
    assert load_hparams_from_csv(tmp_path / "h.csv") == {"lr": 0.1, "name": "resnet", "sizes": [1, 2]}


def test_a_yaml_file_runs_no_code(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    (tmp_path / "h.yaml").write_text("x: !!python/object/apply:os.getcwd []\n")

    with pytest.raises(yaml.YAMLError):
        load_hparams_from_yaml(tmp_path / "h.yaml")
