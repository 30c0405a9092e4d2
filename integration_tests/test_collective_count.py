"""Between declared points the Trainer issues no collective of its own: a step of DDP begins as many as raw DDP's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.proves("4.14")
def test_a_step_of_ddp_under_the_trainer_begins_as_many_collectives_as_raw_ddp(tmp_path: Path) -> None:
    script = Path(__file__).with_name("collective_count_script.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"counts-{rank}.json").read_text())
        for name in ("plain", "accumulated"):
            # The first steps of a wrapper also agree on its buckets; then come whole windows of four.
            ours, raw = found[name][7:23], found[f"raw {name}"][7:23]
            assert sum(begun for begun, _ in ours) == sum(raw), "rows, bar, clipping and a checkpoint add none"
            assert not any(called for _, called in ours), "and no function of torch.distributed is called"
        assert sum(found["raw accumulated"]) < sum(found["raw plain"]), "the count would see one"
