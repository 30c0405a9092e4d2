"""A program that Hydra has started, on two ranks: one job, one folder.

This file is also the program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

hydra = pytest.importorskip("hydra", reason="hydra-core is not installed")

if __name__ == "__main__":

    @hydra.main(version_base=None, config_name=None)
    def main(config: Any) -> None:
        import fulmen

        fabric = fulmen.Fabric(accelerator="cpu", devices=2, strategy="ddp")
        fabric.launch()
        job = hydra.core.hydra_config.HydraConfig.get()
        result = {
            "rank": fabric.global_rank, "lr": config.lr, "cwd": os.getcwd(), "name": job.job.name,
            "output": job.runtime.output_dir, "started": hydra.utils.get_original_cwd(),
        }  # fmt: skip
        Path(f"rank-{fabric.global_rank}.json").write_text(json.dumps(result))

    main()
    sys.exit()


@pytest.mark.proves("4.34")
def test_the_ranks_of_a_hydra_program_are_one_job_in_one_folder(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = ["+lr=0.1", f"hydra.run.dir={tmp_path / 'a run'}", "hydra.job.chdir=True"]
    done = subprocess.run(
        [sys.executable, __file__, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads((tmp_path / "a run" / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["rank"] for one in found] == [0, 1]
    for one in found:
        assert one["lr"] == 0.1
        assert one["cwd"] == one["output"] == str(tmp_path / "a run")
        assert one["started"] == str(tmp_path)
    assert found[1]["name"] == found[0]["name"] + "_rank1"
