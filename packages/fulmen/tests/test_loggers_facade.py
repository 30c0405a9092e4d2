"""The loggers that people look for under fulmen.loggers."""

from __future__ import annotations

import pytest

import fulmen.loggers


@pytest.mark.proves("6.6")
@pytest.mark.parametrize("name", ["LitLogger", "NeptuneLogger"])
def test_a_logger_that_is_not_there_says_why_and_what_to_do(name: str) -> None:
    with pytest.raises(ImportError, match=f"has no {name}.*Trainer\\(logger="):
        getattr(fulmen.loggers, name)


def test_every_name_that_is_offered_is_there() -> None:
    for name in fulmen.loggers.__all__:
        assert getattr(fulmen.loggers, name).__name__ == name
