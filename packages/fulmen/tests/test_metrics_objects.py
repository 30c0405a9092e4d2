"""torchmetrics objects in the store."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn

from fulmen.metrics import MetricStore, scope_for
from fulmen_protocols.errors import MisconfigurationException


class Alone:
    rank = 0
    world_size = 1


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.MeanMetric()
        self.inner = nn.ModuleDict({"worst": torchmetrics.MaxMetric()})
        self.seen = torchmetrics.CatMetric()


def make_store() -> MetricStore:
    store = MetricStore(device=torch.device("cpu"), collectives=Alone(), stage="train")  # type: ignore[arg-type]  # a stand-in
    store.scope = scope_for("training_step")
    store.start_batch(torch.zeros(1, 2), 0, None)
    return store


def log(store: MetricStore, name: str, value: object, module: nn.Module | None, attribute: str | None = None) -> None:
    store.log(
        name, value, False, None, True, True, "mean", False, None, True, None, attribute, False, module=module
    )  # fmt: skip


@pytest.mark.proves("6.11", "6.19")
def test_a_metric_object_gives_the_batchs_value_at_the_step_and_its_own_at_the_epochs_end() -> None:
    store, model = make_store(), Model()
    for value, weight in ((1.0, 1.0), (5.0, 3.0)):
        model.accuracy(torch.tensor(value), weight=weight)
        log(store, "acc", model.accuracy, model)
    assert float(store.callback_metrics["acc_step"]) == 5.0

    store.reduce_epoch()

    assert float(store.callback_metrics["acc_epoch"]) == 4.0


@pytest.mark.proves("6.19")
def test_the_framework_resets_metric_objects() -> None:
    store, model = make_store(), Model()
    model.accuracy(torch.tensor(1.0))
    log(store, "acc", model.accuracy, model)
    store.reset()
    model.accuracy(torch.tensor(3.0))
    log(store, "acc", model.accuracy, model)
    store.reduce_epoch()
    assert float(store.callback_metrics["acc_epoch"]) == 3.0


def test_an_object_that_was_only_updated_has_no_step_value() -> None:
    store, model = make_store(), Model()
    model.accuracy.update(torch.tensor(1.0))
    log(store, "acc", model.accuracy, model)
    assert store.step_metrics().log == {}


def test_a_metric_object_must_belong_to_the_module() -> None:
    stray = torchmetrics.MeanMetric()
    with pytest.raises(MisconfigurationException, match=r"assign it in __init__. Found: accuracy, inner.worst, seen"):
        log(make_store(), "acc", stray, Model())
    model = Model()
    with pytest.raises(MisconfigurationException, match="not the object that was logged"):
        log(make_store(), "acc", model.accuracy, model, "seen")
    log(make_store(), "worst", model.inner["worst"], model, "inner.worst")


def test_one_name_is_one_object() -> None:
    store, model = make_store(), Model()
    model.accuracy(torch.tensor(1.0))
    log(store, "x", model.accuracy, model)
    with pytest.raises(MisconfigurationException, match="another metric object"):
        log(store, "x", model.seen, model)


def test_metric_objects_resume_in_mid_epoch_with_their_state(tmp_path: Any) -> None:
    def feed(store: MetricStore, model: Model, values: list[float]) -> None:
        for value in values:
            for name, metric in (("acc", model.accuracy), ("worst", model.inner["worst"]), ("seen", model.seen)):
                metric(torch.tensor(value))
                if name != "seen":
                    log(store, name, metric, model)
        # a list state; logged as an object, its compute() is a vector, so only its state is looked at
        entry_options = (False, None, False, True, "mean", False, None, True, None, None, False)
        store.scope = scope_for("on_train_batch_end")
        store.log("seen", model.seen, *entry_options, module=model)
        store.scope = scope_for("training_step")

    first, second = make_store(), make_store()
    old, new = Model(), Model()
    feed(first, old, [9.0, 1.0])
    torch.save(first.state_dict(), tmp_path / "metrics.pt")
    second.load_state_dict(torch.load(tmp_path / "metrics.pt", weights_only=True), module=new)
    feed(second, new, [2.0])
    second.reduce_epoch()

    assert float(second.callback_metrics["acc_epoch"]) == 4.0
    assert float(second.callback_metrics["worst_epoch"]) == 9.0
    assert new.seen.compute().tolist() == [9.0, 1.0, 2.0]


def test_torchmetrics_is_not_imported_by_the_store() -> None:
    code = (
        "import sys, torch; from fulmen.metrics import MetricStore, scope_for\n"
        "class A: rank = 0; world_size = 1\n"
        "s = MetricStore(device=torch.device('cpu'), collectives=A(), stage='train')\n"
        "s.scope = scope_for('training_step')\n"
        "s.start_batch(torch.zeros(1), 0, None)\n"
        "s.log('x', 1.0, False, None, True, True, 'mean', False, None, True, None, None, False, module=None)\n"
        "s.reduce_epoch(); assert not {'torchmetrics', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
