"""The loggers take what Lightning's take."""

from __future__ import annotations

import inspect
from typing import Any

import lightning.fabric.loggers
import lightning.pytorch.loggers
import pytest

import fulmen.loggers


def parameters(function: Any) -> dict[str, tuple[object, object]]:
    found = inspect.signature(function).parameters.values()
    return {parameter.name: (parameter.default, parameter.kind) for parameter in found}


@pytest.mark.proves("6.2", "6.3", "6.4", "6.5", "6.6")
@pytest.mark.parametrize("name", ["TensorBoardLogger", "CSVLogger", "WandbLogger", "MLFlowLogger", "CometLogger"])
def test_a_logger_is_made_with_the_same_arguments_in_the_same_order(name: str) -> None:
    theirs, ours = (parameters(getattr(of, name).__init__) for of in (lightning.pytorch.loggers, fulmen.loggers))

    assert list(ours.items()) == list(theirs.items())


@pytest.mark.proves("6.2", "6.3")
@pytest.mark.parametrize("name", ["TensorBoardLogger", "CSVLogger"])
def test_a_loop_of_ones_own_makes_it_with_the_arguments_of_fabrics_which_come_in_the_same_order(name: str) -> None:
    theirs = list(parameters(getattr(lightning.fabric.loggers, name).__init__).items())
    ours = [entry for entry in parameters(getattr(fulmen.loggers, name).__init__).items() if entry[0] != "log_graph"]

    assert (theirs[1][0], ours[1][0]) == ("root_dir", "save_dir")
    assert theirs[2:] == ours[2:]


@pytest.mark.proves("6.4")
@pytest.mark.parametrize(
    "method",
    ["watch", "log_table", "log_text", "log_image", "log_audio", "log_video", "download_artifact", "use_artifact"],
)
def test_what_weights_and_biases_records_beside_numbers_is_given_the_same_arguments(method: str) -> None:
    theirs, ours = (parameters(getattr(of.WandbLogger, method)) for of in (lightning.pytorch.loggers, fulmen.loggers))

    assert list(ours.items()) == list(theirs.items())


@pytest.mark.proves("6.2")
def test_tensorboards_hyperparameters_are_given_the_same_arguments() -> None:
    theirs, ours = (
        parameters(of.TensorBoardLogger.log_hyperparams) for of in (lightning.pytorch.loggers, fulmen.loggers)
    )

    assert [name for name in ours if name != "more"] == list(theirs)
    assert (ours["metrics"], ours["step"]) == (theirs["metrics"], theirs["step"])
