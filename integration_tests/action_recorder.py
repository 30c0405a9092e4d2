"""Counts the actions that a SimpleProfiler sees in the scenarios of ``hook_recorder.py``.

``python action_recorder.py LIBRARY`` prints them as JSON; LIBRARY is a package with Lightning's names.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings

import torch
from hook_recorder import SCENARIOS, run


def count(library: str, scenario: str) -> dict[str, int]:
    profiler = importlib.import_module(f"{library}.profilers").SimpleProfiler()
    run(library, scenario, profiler=profiler)
    return {action: len(durations) for action, durations in profiler.recorded_durations.items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    print("ACTIONS" + json.dumps({scenario: count(sys.argv[1], scenario) for scenario in SCENARIOS}))
