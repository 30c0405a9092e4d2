"""A service's logger without its library."""

from __future__ import annotations

from typing import Any

import pytest

import fulmen_loggers._optional
from fulmen_loggers import CometLogger, MLFlowLogger, WandbLogger
from fulmen_protocols import MissingPackage


@pytest.mark.parametrize(
    ("logger", "module", "extra"),
    [(WandbLogger, "wandb", "wandb"), (MLFlowLogger, "mlflow", "mlflow"), (CometLogger, "comet_ml", "comet")],
)
def test_a_missing_library_is_named_with_what_installs_it_when_the_logger_is_made(
    logger: Any, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fulmen_loggers._optional, "find_spec", lambda name: None)

    with pytest.raises(MissingPackage) as raised:
        logger()

    assert str(raised.value) == (
        f"{logger.__name__} needs {module}, which is not installed. Run: pip install 'fulmen-loggers[{extra}]'"
    )
