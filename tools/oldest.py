"""Test on the oldest torch that the packages take, which has other private functions: ``python -m tools.oldest``.

[pytest arguments ...] replace the tests that are run. That torch is in the environment of ``tools.xla``, which is for
the same version; torch-xla itself is not used.
"""

from __future__ import annotations

import subprocess
import sys

from tools import xla
from tools.workspace import ROOT

TESTS = [
    "integration_tests/test_fsdp_ranks.py",
    "packages/fulmen-strategies/tests",
    "packages/fulmen-checkpoint/tests",
    "packages/fulmen-fabric/tests",
]
"""Where torch's private functions are called: FSDP2, process groups, launchers, the formats of checkpoints."""


def main(arguments: list[str]) -> int:
    """Return pytest's status."""
    python = xla.ensure()
    environment = {name: value for name, value in xla.environment().items() if name != "PJRT_DEVICE"}
    command = [str(python), "-m", "pytest", *(arguments or ["-m", "not slow", *TESTS])]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
