"""The names of strategies, what is chosen for "auto", and parts that are given twice."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch

import fulmen
from fulmen.plugins import (
    DoublePrecision,
    LightningEnvironment,
    MixedPrecision,
    TorchCheckpointIO,
    TorchElasticEnvironment,
    TorchSyncBatchNorm,
)
from fulmen.strategies import DDPStrategy
from fulmen_fabric import assemble
from fulmen_protocols import (
    STRATEGIES,
    MisconfigurationException,
    MisconfigurationTypeError,
    StrategyParts,
    available,
    load,
)

UNUSED = {"find_unused_parameters": True}
NAMES: dict[str, tuple[str, dict[str, object]]] = {
    "ddp": ("local", {}),
    "ddp_find_unused_parameters_false": ("local", {}),
    "ddp_find_unused_parameters_true": ("local", UNUSED),
    **{
        f"ddp_{kind}{suffix}": (method, options)
        for kind, method in (("spawn", "spawn"), ("fork", "fork"), ("notebook", "fork"))
        for suffix, options in (
            ("", {}),
            ("_find_unused_parameters_false", {}),
            ("_find_unused_parameters_true", UNUSED),
        )
    },
}


def refusal(**arguments: Any) -> str:
    with pytest.raises(MisconfigurationException) as refused:
        assemble(**{"accelerator": "cpu", **arguments})
    return str(refused.value)


@pytest.mark.proves("4.2", "4.3")
@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_ddp_is_what_it_says(name: str) -> None:
    launcher, options = NAMES[name]
    found = assemble(accelerator="cpu", devices=2, strategy=name)
    assert isinstance(found.strategy, DDPStrategy)
    assert (found.strategy.launcher, found.strategy._options) == (launcher, options)
    assert found.launcher is not None
    assert getattr(found.launcher, "start_method", "local") == launcher


@pytest.mark.proves("4.3")
@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed to compare with")
def test_every_name_that_lightnings_fabric_knows_means_the_same_kind_of_strategy() -> None:
    script = """
from lightning.fabric.strategies import STRATEGY_REGISTRY
for name, entry in STRATEGY_REGISTRY.items():
    print(name, entry["strategy"].__name__)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    theirs = dict(line.split() for line in done.stdout.splitlines())
    theirs.pop("single_tpu")  # was removed there: using it is an error
    assert set(theirs) <= set(available(STRATEGIES))
    # Engines are packages of their own.
    theirs = {
        name: kind for name, kind in theirs.items() if not any(word in name for word in ("deepspeed", "xla", "tpu"))
    }

    assert len(theirs) >= 8
    assert {name: type(load(STRATEGIES, name)).__name__ for name in theirs} == theirs


@pytest.mark.proves("4.1")
def test_what_auto_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29533")
    monkeypatch.setenv("NODE_RANK", "0")
    assert assemble(accelerator="cpu", devices=1).strategy_name == "single_device"
    assert assemble(accelerator="cpu", devices=2).strategy_name == "ddp"
    assert assemble(accelerator="cpu", devices=1, num_nodes=2).strategy_name == "ddp"
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    found = assemble(accelerator="cpu", devices=2)
    assert found.strategy_name == "ddp_fork"
    assert any("strategy='auto' chose 'ddp_fork' for 2 processes" in line for line in found.chosen)
    assert assemble(accelerator="cpu", devices=1).strategy_name == "single_device"


@pytest.mark.proves("4.5")
@pytest.mark.parametrize("name", ["ddp", "ddp_spawn"])
def test_at_a_prompt_what_cannot_be_started_there_points_to_what_can(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    text = refusal(devices=2, strategy=name)
    assert f"strategy {name!r} starts 2 processes" in text
    assert "interactive session" in text
    assert "strategy='ddp_notebook'" in text
    assert assemble(accelerator="cpu", devices=2, strategy="ddp_notebook").launcher is not None


@pytest.mark.proves("4.4")
def test_parts_given_to_the_strategy_are_used() -> None:
    environment, io, precision = LightningEnvironment(), TorchCheckpointIO(), DoublePrecision()
    accelerator = assemble(accelerator="cpu").accelerator
    strategy = DDPStrategy(
        accelerator=accelerator, parallel_devices=[torch.device("cpu")] * 3, cluster_environment=environment,
        checkpoint_io=io, precision_plugin=precision,
    )  # fmt: skip
    assert strategy.parts == StrategyParts(accelerator, strategy.parts.parallel_devices, environment, io, precision)
    found = assemble(strategy=strategy)
    assert (found.accelerator, found.environment, found.checkpoint_io) == (accelerator, environment, io)
    assert (found.precision, found.world_size) == (precision, 3)


@pytest.mark.proves("4.4")
def test_parts_given_twice_are_all_named() -> None:
    accelerator = assemble(accelerator="cpu").accelerator
    strategy = DDPStrategy(
        accelerator=accelerator, cluster_environment=LightningEnvironment(), checkpoint_io=TorchCheckpointIO(),
        precision_plugin=DoublePrecision(),
    )  # fmt: skip
    text = refusal(strategy=strategy, precision="bf16-mixed", plugins=[LightningEnvironment(), TorchCheckpointIO()])
    assert "4 conflicts" in text
    for part in (
        "DDPStrategy(accelerator=CPUAccelerator(...)) and accelerator='cpu' both say it. Give one of the two.",
        "DDPStrategy(precision_plugin=DoublePrecision(...)) and precision='bf16-mixed' both say it.",
        "DDPStrategy(checkpoint_io=TorchCheckpointIO(...)) and plugins=TorchCheckpointIO both say it.",
        "DDPStrategy(cluster_environment=LightningEnvironment(...)) and plugins=LightningEnvironment both say it.",
    ):
        assert part in text
    by_plugin = refusal(strategy=DDPStrategy(precision_plugin=DoublePrecision()), plugins=DoublePrecision())
    assert "precision_plugin=DoublePrecision(...)) and plugins=DoublePrecision both say it" in by_plugin


@pytest.mark.proves("4.4")
def test_the_strategys_devices_are_compared_with_accelerator_and_count() -> None:
    gpus = DDPStrategy(parallel_devices=[torch.device("cuda", 0), torch.device("cuda", 1)])
    text = refusal(strategy=gpus)
    assert "cuda:0, cuda:1" in text
    assert "accelerator 'cpu' drives 'cpu'. Pass accelerator='cuda'" in text
    cpus = DDPStrategy(parallel_devices=[torch.device("cpu")] * 2)
    assert "has 2 devices, and devices=3 was given too. Give one of the two" in refusal(strategy=cpus, devices=3)
    assert "parallel_devices=[]) names no device" in refusal(strategy=DDPStrategy(parallel_devices=[]))
    assert assemble(accelerator="cpu", strategy=cpus, devices=2).world_size == 2


class DoublesLayers:
    """A LayerSync of the user's."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def apply(self, model: Any) -> Any:
        self.calls.append("apply")
        return model

    def revert(self, model: Any) -> Any:
        self.calls.append("revert")
        return model


@pytest.mark.proves("4.6")
def test_a_trainer_takes_one_plugin_of_each_kind_and_a_fabric_no_layer_sync() -> None:
    sync = DoublesLayers()
    plugins = [DoublePrecision(), TorchCheckpointIO(), LightningEnvironment(), sync]
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1}
    trainer = fulmen.Trainer(plugins=plugins, **quiet)  # type: ignore[arg-type]  # wrong on purpose
    assert trainer.assembly.layer_sync is sync
    found = trainer.assembly
    assert [found.precision, found.checkpoint_io, found.environment] == plugins[:3]
    for twice, noun in (
        ([DoublePrecision(), MixedPrecision("bf16-mixed", "cpu")], "precision"),
        ([TorchCheckpointIO(), TorchCheckpointIO()], "checkpoint IO"),
        ([LightningEnvironment(), TorchElasticEnvironment()], "cluster environment"),
        ([sync, TorchSyncBatchNorm()], "layer sync"),
    ):
        with pytest.raises(MisconfigurationException, match=f"2 of them are a {noun} .* Give at most one"):
            fulmen.Trainer(plugins=twice, **quiet)  # type: ignore[arg-type]  # wrong on purpose
    for wrong in (object(), "ddp"):
        with pytest.raises(MisconfigurationTypeError, match="plugins: "):
            fulmen.Trainer(plugins=[wrong], **quiet)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(MisconfigurationException, match="DoublesLayers is a layer sync, which a Trainer applies"):
        fulmen.Fabric(accelerator="cpu", plugins=[sync])


@pytest.mark.parametrize("make", [fulmen.Trainer, fulmen.Fabric])
def test_a_precision_that_was_made_for_another_kind_of_device_is_refused(make: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"device='cuda'\): the run is on 'cpu'.*Give device='cpu', or"):
        make(accelerator="cpu", devices=1, plugins=MixedPrecision("bf16-mixed", "cuda"))
    with pytest.raises(MisconfigurationException, match=r"2 conflicts(.|\n)*the run is on 'cpu'"):
        make(accelerator="cpu", devices=1, strategy="dpp", plugins=MixedPrecision("bf16-mixed", "cuda"))
    make(accelerator="cpu", devices=1, plugins=MixedPrecision("bf16-mixed", "cpu"))


class Normed(fulmen.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(devices: int, **options: Any) -> None:
    data = torch.utils.data.TensorDataset(torch.randn(16, 4))
    trainer = fulmen.Trainer(
        accelerator="cpu", devices=devices, strategy="auto" if devices == 1 else "ddp_fork", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(Normed(), torch.utils.data.DataLoader(data, batch_size=4))


@pytest.mark.proves("4.6")
def test_a_layer_sync_is_applied_around_a_fit_of_several_processes(tmp_path: Any) -> None:
    class Writes(DoublesLayers):
        def apply(self, model: Any) -> Any:
            (tmp_path / f"apply-{model.global_rank}").touch()
            return model

        def revert(self, model: Any) -> Any:
            (tmp_path / f"revert-{model.global_rank}").touch()
            return model

    fit(1, plugins=Writes())
    assert list(tmp_path.iterdir()) == []
    fit(2, plugins=Writes())
    assert {path.name for path in tmp_path.iterdir()} == {"apply-0", "apply-1", "revert-0", "revert-1"}


@pytest.mark.proves("4.6")
def test_layers_are_replaced_by_one_hand_alone_and_where_torch_can() -> None:
    with pytest.raises(MisconfigurationException, match=r"sync_batchnorm=True and plugins=DoublesLayers.* Give one of"):
        fit(1, plugins=DoublesLayers(), sync_batchnorm=True)
    with pytest.raises(MisconfigurationException, match=r"plugins=TorchSyncBatchNorm\(\) with 2 processes on the CPU"):
        fit(2, plugins=TorchSyncBatchNorm())
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    own, sync = model[0], TorchSyncBatchNorm()
    assert isinstance(sync.apply(model)[0], torch.nn.SyncBatchNorm)
    assert sync.revert(model)[0] is own
