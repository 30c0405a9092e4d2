"""Test on the real DeepSpeed, on the CPU: ``python -m tools.deepspeed_session [pytest arguments]``.

In ``.nox/deepspeed``, which is made if need be: DeepSpeed is installed, its operators are built once, in one process,
and the tests run that need it. A build that was killed leaves a lock behind, for which every later run would wait for
ever: what is half built is deleted first.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from tools.environment import ensure, pip_install
from tools.workspace import ROOT

HOME = ROOT / ".nox" / "deepspeed"
TESTS = [
    "packages/fulmen-deepspeed",
    "integration_tests/test_deepspeed_ranks.py",
    "integration_tests/test_deepspeed_after_ddp.py",
]
BUILD = """
import deepspeed, torch.distributed
from deepspeed.ops.op_builder import CPUAdamBuilder
deepspeed.init_distributed("gloo", verbose=False)  # builds the one for shared memory
CPUAdamBuilder().load(verbose=False)
torch.distributed.destroy_process_group()
"""


def delete_half_built(folder: Path) -> list[str]:
    """Delete the operators in ``folder`` whose build did not end; return their names."""
    broken = [lock.parent for lock in folder.glob("*/lock")]
    for one in broken:
        shutil.rmtree(one)
    return sorted(one.name for one in broken)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main(arguments: list[str]) -> int:
    """Return pytest's status."""
    python = ensure(["test"], HOME)
    pip_install(python, "deepspeed", "ninja")
    extensions = HOME / "extensions"
    for name in delete_half_built(extensions):
        print(f"deleted {name}, whose build had not ended")
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(extensions),
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",  # where ninja is
    }
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    ready = {**env, **alone, "MASTER_PORT": str(free_port())}
    subprocess.run([str(python), "-c", BUILD], cwd=ROOT, env=ready, check=True)
    command = [str(python), "-m", "pytest", "-m", "slow or not slow", *(arguments or TESTS)]
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
