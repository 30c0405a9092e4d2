"""What one rank of a run needs in memory, found on one CPU: ``trainer.plan(model)`` and ``fulmen plan``.

The run's own strategy, precision and optimizer take one step on fake tensors, which have shapes and no values, among
ranks that do not exist (torch's fake process group). Every allocation is recorded.
"""

from __future__ import annotations

from fulmen.memory_plan.report import MemoryPlan as MemoryPlan
from fulmen.memory_plan.report import ParameterGroup as ParameterGroup

__all__ = ["MemoryPlan", "ParameterGroup"]
