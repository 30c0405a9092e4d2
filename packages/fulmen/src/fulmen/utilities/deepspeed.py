"""DeepSpeed's checkpoints as one file, where Lightning has it; it lives in fulmen-deepspeed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulmen._not_here import elsewhere

if TYPE_CHECKING:
    from fulmen_deepspeed import (
        convert_zero_checkpoint_to_fp32_state_dict as convert_zero_checkpoint_to_fp32_state_dict,
    )

_ELSEWHERE = {"convert_zero_checkpoint_to_fp32_state_dict": "fulmen_deepspeed"}


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one that is found here

    def __getattr__(name: str) -> object:
        return elsewhere("fulmen.utilities.deepspeed", name, _ELSEWHERE, {})
