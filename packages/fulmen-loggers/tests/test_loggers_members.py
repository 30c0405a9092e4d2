"""Code that calls Lightning's members on whatever logger there is works with each of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from torch import nn

from fulmen_loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

if TYPE_CHECKING:
    from pathlib import Path

MEMBERS = {
    "group_separator",
    "log_graph",
    "after_save_checkpoint",
    "log_hyperparams",
    "log_metrics",
    "save",
    "finalize",
}


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger, WandbLogger, MLFlowLogger, CometLogger])
def test_each_has_the_members_that_code_calls_without_asking(kind: type) -> None:
    assert set(dir(kind)) >= MEMBERS
    assert kind.group_separator == "/"


def test_a_logger_that_draws_and_stores_nothing_takes_the_calls_and_writes_no_file(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_graph(nn.Linear(1, 1))
    logger.after_save_checkpoint(object())
    assert list(tmp_path.rglob("*")) == []
