"""load_from_checkpoint of modules and data modules, from real files."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fulmen.datamodule import LightningDataModule
from fulmen.hparams import checkpoint_entries
from fulmen.module import LightningModule
from fulmen.trainer import Trainer
from fulmen_protocols import CHECKPOINT_IOS, MisconfigurationException, load

if TYPE_CHECKING:
    from pathlib import Path


class Net(LightningModule):
    def __init__(self, width: int = 2, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)


def saved(module: LightningModule, path: Path, **more: Any) -> Path:
    """As a run writes it: weights and hyperparameters."""
    content = {"state_dict": module.state_dict(), **checkpoint_entries(module), **more}
    load(CHECKPOINT_IOS, "torch").save_checkpoint(content, path)
    return path


@pytest.mark.proves("5.3", "5.31")
def test_weights_and_hyperparameters_come_back(tmp_path: Path) -> None:
    module = Net(width=5, lr=0.7)

    loaded = Net.load_from_checkpoint(saved(module, tmp_path / "a.ckpt"))

    assert loaded.hparams == {"width": 5, "lr": 0.7}
    assert torch.equal(loaded.layer.weight, module.layer.weight)
    assert (loaded.device, loaded.training) == (torch.device("cpu"), True)


@pytest.mark.proves("5.31")
def test_a_file_that_plain_torch_wrote_is_read(tmp_path: Path) -> None:
    module = Net(3)
    # The keys are those of a file of Lightning.
    torch.save(
        {"state_dict": module.state_dict(), "hyper_parameters": {"width": 3, "gone": 1, "_instantiator": "x.y"}},
        tmp_path / "l.ckpt",
    )

    assert torch.equal(Net.load_from_checkpoint(str(tmp_path / "l.ckpt")).layer.weight, module.layer.weight)


@pytest.mark.proves("5.31")
def test_keywords_override_saved_hyperparameters(tmp_path: Path) -> None:
    path = saved(Net(width=3), tmp_path / "a.ckpt")

    assert Net.load_from_checkpoint(path, lr=9.0).hparams == {"width": 3, "lr": 9.0}
    with pytest.raises(TypeError, match="lear"):
        Net.load_from_checkpoint(path, lear=9.0)


@pytest.mark.proves("5.31")
def test_hyperparameters_that_the_class_does_not_take_are_dropped_unless_it_takes_any(tmp_path: Path) -> None:
    class Open(LightningModule):
        def __init__(self, width: int, **more: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Linear(width, 1)

    class Narrow(LightningModule):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layer = nn.Linear(width, 1)

    class Bare(LightningModule):
        def configure_model(self) -> None:
            self.layer = nn.Linear(3, 1)

    path = saved(Open(3, extra="e"), tmp_path / "a.ckpt")

    assert Open.load_from_checkpoint(path).hparams.extra == "e"
    assert Narrow.load_from_checkpoint(path).layer.in_features == 3
    assert Bare.load_from_checkpoint(path).layer.in_features == 3


def test_one_configuration_object_comes_back_and_is_overridden_inside(tmp_path: Path) -> None:
    class Configured(LightningModule):
        def __init__(self, config: Any, name: str = "n") -> None:
            super().__init__()
            self.save_hyperparameters(config)
            self.name = name
            self.layer = nn.Linear(config.width, 1)

    path = saved(Configured(Namespace(width=4, depth=1)), tmp_path / "a.ckpt")

    loaded = Configured.load_from_checkpoint(path, depth=2, name="other")

    assert loaded.hparams == {"width": 4, "depth": 2}
    assert loaded.name == "other"


@pytest.mark.proves("5.31")
def test_layers_of_configure_model_exist_before_weights_are_loaded(tmp_path: Path) -> None:
    class Late(LightningModule):
        def configure_model(self) -> None:
            self.layer = nn.Linear(2, 1)

    module = Late()
    module.configure_model()

    assert torch.equal(Late.load_from_checkpoint(saved(module, tmp_path / "a.ckpt")).layer.weight, module.layer.weight)


@pytest.mark.proves("5.35")
def test_the_modules_hook_may_change_what_is_loaded(tmp_path: Path) -> None:
    class Renamed(Net):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {k.replace("old.", ""): v for k, v in checkpoint["state_dict"].items()}
            self.seen = checkpoint["note"]

    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": {f"old.{k}": v for k, v in Net().state_dict().items()}, "note": 5}, path)

    assert Renamed.load_from_checkpoint(path).seen == 5


@pytest.mark.proves("5.33")
def test_keys_must_match_unless_told_otherwise(tmp_path: Path) -> None:
    class Lenient(Net):
        def __init__(self, width: int = 2, lr: float = 0.1) -> None:
            super().__init__(width, lr)
            self.strict_loading = False
            self.extra = nn.Linear(1, 1, bias=False)

    class Strict(Lenient):
        def __init__(self, width: int = 2, lr: float = 0.1) -> None:
            super().__init__(width, lr)
            self.strict_loading = None

    module = Net()
    module.other = nn.Linear(1, 1, bias=False)
    path = saved(module, tmp_path / "a.ckpt")

    with pytest.raises(RuntimeError, match=r"Missing key.*extra.weight"):
        Strict.load_from_checkpoint(path)
    for cls, strict in ((Lenient, None), (Strict, False)):
        with pytest.warns(UserWarning, match="lacks|has no place") as warned:
            assert torch.equal(cls.load_from_checkpoint(path, strict=strict).layer.weight, module.layer.weight)
        texts = [str(warning.message) for warning in warned]
        assert "lacks ['extra.weight']" in texts[0]
        assert "has no place for ['other.weight']" in texts[1]
    with pytest.raises(MisconfigurationException, match=r"strict=True, and Lenient\.strict_loading is False"):
        Lenient.load_from_checkpoint(path, strict=True)


@pytest.mark.proves("5.33")
def test_strict_loading_is_true_unless_set() -> None:
    module = LightningModule()
    assert module.strict_loading is True
    module.strict_loading = False
    assert module.strict_loading is False


@pytest.mark.proves("5.31")
def test_it_is_refused_on_an_instance() -> None:
    module = Net()
    with pytest.raises(TypeError, match=r"Call Net\.load_from_checkpoint"):
        module.load_from_checkpoint("x")


@pytest.mark.parametrize("location", [None, "cpu", torch.device("cpu"), lambda storage, where: storage])
def test_weights_go_where_they_are_wanted(tmp_path: Path, location: Any) -> None:
    loaded = Net.load_from_checkpoint(saved(Net(), tmp_path / "a.ckpt"), map_location=location)

    assert loaded.device == torch.device("cpu")


def test_a_map_of_devices_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="Give a device"):
        Net.load_from_checkpoint(saved(Net(), tmp_path / "a.ckpt"), map_location={"cuda:1": "cuda:0"})


class Payload:
    """Would run code when unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code of the file ran')",)


@pytest.mark.proves("5.15")
def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": Net().state_dict(), "hyper_parameters": {"lr": Payload()}}, path)

    with pytest.raises(ValueError, match="weights_only"):
        Net.load_from_checkpoint(path)
    with pytest.raises(SystemExit, match="code of the file ran"):
        Net.load_from_checkpoint(path, weights_only=False)


def test_what_is_not_there_or_holds_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Net.load_from_checkpoint(tmp_path / "nothing.ckpt")
    torch.save({"weights": {}}, tmp_path / "other.ckpt")
    with pytest.raises(MisconfigurationException, match=r"\['weights'\] and 'state_dict' is not among them"):
        Net.load_from_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.proves("5.31")
def test_hyperparameters_may_come_from_a_file_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    torch.save({"state_dict": Net(3).state_dict()}, tmp_path / "a.ckpt")
    (tmp_path / "h.yaml").write_text("width: 3\n")
    (tmp_path / "h.csv").write_text("key,value\nwidth,3\n")

    for name in ("h.yaml", "h.csv"):
        assert Net.load_from_checkpoint(tmp_path / "a.ckpt", hparams_file=tmp_path / name).hparams.width == 3
    with pytest.raises(MisconfigurationException, match=r"'.*h\.txt'. Its name ends in"):
        Net.load_from_checkpoint(tmp_path / "a.ckpt", hparams_file=tmp_path / "h.txt")


class Data(LightningDataModule):
    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.position = 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position = state_dict["position"]


class Augmented(Data):
    """A subclass with hyperparameters of its own besides those of its base."""

    def __init__(self, noise: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.save_hyperparameters()

    def state_dict(self) -> dict[str, Any]:
        return {"position": 7}

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(2, 2), batch_size=self.hparams.batch_size)  # type: ignore[arg-type]  # a tensor is a data set


@pytest.mark.proves("5.32")
def test_a_subclass_of_a_data_module_gets_its_own_and_its_base_s_back_from_a_run(tmp_path: Path) -> None:
    class Fitted(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.hparams.lr)

    data = Augmented(noise=0.5, batch_size=1)
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Fitted(), datamodule=data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")

    loaded = Augmented.load_from_checkpoint(tmp_path / "run.ckpt")

    assert type(loaded) is Augmented
    assert dict(loaded.hparams) == {"noise": 0.5, "batch_size": 1}
    assert loaded.position == 7
    assert Data.load_from_checkpoint(tmp_path / "run.ckpt").position == 0, "the state is that of another class"


@pytest.mark.proves("5.32", "10.21")
def test_data_modules_get_their_hyperparameters_and_state_back(tmp_path: Path) -> None:
    entries = checkpoint_entries(Data(batch_size=8), "datamodule_")
    saved(Net(), tmp_path / "a.ckpt", **entries, Data={"position": 5})

    loaded = Data.load_from_checkpoint(tmp_path / "a.ckpt")
    assert (loaded.hparams.batch_size, loaded.position) == (8, 5)
    assert Data.load_from_checkpoint(tmp_path / "a.ckpt", batch_size=1).hparams.batch_size == 1
    with pytest.raises(TypeError, match=r"Call Data\.load_from_checkpoint"):
        loaded.load_from_checkpoint("x")
