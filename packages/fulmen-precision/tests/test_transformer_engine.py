"""Transformer Engine cannot be installed without a GPU's toolkit: what is refused, and how."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from fulmen_precision import TransformerEnginePrecision
from fulmen_protocols import BackendUnavailable, MisconfigurationException


def test_a_wrong_dtype_of_weights_is_named_with_what_is_allowed() -> None:
    with pytest.raises(MisconfigurationException, match=r"weights_dtype=torch\.int8\. Allowed: torch\.bfloat16"):
        TransformerEnginePrecision(weights_dtype=torch.int8)


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="Transformer Engine is installed")
@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.bfloat16, "transformer-engine"), (torch.float16, "transformer-engine-float16")]
)
def test_without_the_library_the_error_says_how_to_get_it(dtype: torch.dtype, name: str) -> None:
    with pytest.raises(
        BackendUnavailable, match=rf"'{name}' needs Transformer Engine.*pip install 'transformer-engine"
    ):
        TransformerEnginePrecision(weights_dtype=dtype)
