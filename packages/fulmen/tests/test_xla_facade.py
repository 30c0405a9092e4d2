"""Names of fulmen-xla, where people look for them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import pytest

from fulmen_protocols import MissingPackage

NAMES = [
    *("strategies.SingleDeviceXLAStrategy", "strategies.XLAStrategy", "strategies.XLAFSDPStrategy"),
    *("strategies.XLASPMDStrategy", "accelerators.XLAAccelerator", "plugins.XLAPrecision"),
    *("plugins.XLACheckpointIO", "plugins.XLAShardedCheckpointIO", "plugins.XLAEnvironment"),
]


@pytest.mark.proves("2.1")
@pytest.mark.parametrize("path", NAMES)
def test_a_name_of_fulmen_xla_is_found_or_says_what_to_install(path: str) -> None:
    module, _, name = path.partition(".")
    facade = import_module(f"fulmen.{module}")

    if find_spec("fulmen_xla") is None:
        with pytest.raises(MissingPackage, match=rf"fulmen\.{module}\.{name} is part of fulmen-xla.*'fulmen\[xla\]'"):
            getattr(facade, name)
    else:
        assert getattr(facade, name) is getattr(import_module("fulmen_xla"), name)


@pytest.mark.parametrize("module", ["strategies", "accelerators", "plugins"])
def test_a_name_that_is_nobody_s_is_an_attribute_error(module: str) -> None:
    with pytest.raises(AttributeError, match=rf"module 'fulmen\.{module}' has no attribute 'Nothing'"):
        _ = import_module(f"fulmen.{module}").Nothing
