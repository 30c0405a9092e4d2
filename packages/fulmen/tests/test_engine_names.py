"""Names that live in a package which `fulmen` does not install say how to get it."""

from __future__ import annotations

import sys

import pytest

import fulmen.plugins
import fulmen.strategies
from fulmen_protocols import MissingPackage


@pytest.mark.proves("4.28")
@pytest.mark.parametrize(
    ("module", "name"), [(fulmen.strategies, "DeepSpeedStrategy"), (fulmen.plugins, "DeepSpeedPrecision")]
)
def test_a_name_of_an_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> None:
    monkeypatch.delitem(vars(module), name, raising=False)
    monkeypatch.setitem(sys.modules, "fulmen_deepspeed", None)  # as if it were not installed

    with pytest.raises(MissingPackage, match=rf"{name} needs .*pip install 'fulmen\[deepspeed\]'"):
        getattr(module, name)
