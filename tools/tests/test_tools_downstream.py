"""The runner that compares published libraries on Lightning and on fulmen."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tools.downstream import __main__ as runner
from tools.downstream import child, compare, move

SCRIPT = """
import json
import lightning.pytorch as pl
import other

REQUIRES = ["nothing==1.0"]
PACKAGES = ["other"]
WHAT = "one " "value"


def main():
    return {"trainer": pl.Trainer, "other": other.found()}
"""


@pytest.mark.parametrize(
    ("one", "other", "far"),
    [
        (1, 1.0, 0.0),
        (0.5, 0.5 + 1e-7, 1e-7),
        (200.0, 100.0, 0.5),
        (math.nan, math.nan, 0.0),
        (math.inf, math.inf, 0.0),
        (math.nan, 1.0, math.inf),
        ("a", "b", math.inf),
        ("a", None, math.inf),
        (None, None, 0.0),
    ],
)
def test_the_distance_of_two_values_is_relative_above_one(one: Any, other: Any, far: float) -> None:
    assert compare.distance(one, other) == pytest.approx(far)


def test_differences_name_the_place_and_leave_refusals_out() -> None:
    lightning = {"losses": [1.0, 2.0], "names": {"a": "x"}, "export": [3.0]}
    fulmen = {"losses": [1.0, 2.5], "names": {"a": "x"}, "export": "refused: say so"}

    assert compare.differences(lightning, fulmen) == pytest.approx({"losses[1]": 0.2})
    assert compare.refusals(fulmen) == {"export": "say so"}
    assert "len(losses)" in compare.differences(lightning, {**fulmen, "losses": [1.0]})


def test_a_projects_constants_are_read_without_running_it(tmp_path: Path) -> None:
    script = tmp_path / "project.py"
    script.write_text(SCRIPT)

    assert runner.constants(script) == {"REQUIRES": ["nothing==1.0"], "PACKAGES": ["other"], "WHAT": "one value"}


def test_every_project_says_what_it_installs_moves_and_does() -> None:
    folder = Path(runner.projects.__path__[0])
    for name in runner.PROJECTS:
        found = runner.constants(folder / f"{name}.py")
        assert found["REQUIRES"], name
        assert "==" in found["REQUIRES"][0], f"{name}: its version is not pinned"
        assert found["PACKAGES"], name
        assert found["WHAT"], name


def test_the_guides_command_moves_the_script_with_the_library(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("from pytorch_lightning.callbacks import Timer\n")
    (tmp_path / "project.py").write_text(SCRIPT)

    move.move(tmp_path)

    assert (tmp_path / "other" / "__init__.py").read_text() == "from fulmen.callbacks import Timer\n"
    assert "import fulmen as pl" in (tmp_path / "project.py").read_text()


@pytest.mark.parametrize("options", [[], ["--hide-lightning"], ["--hide-lightning", "allowed"]])
def test_a_run_finds_out_who_still_imports_lightning(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "lightning").mkdir()
    (tmp_path / "lightning" / "__init__.py").write_text("import lightning.inner\n")
    (tmp_path / "lightning" / "inner.py").write_text("")
    trying = "try:\n    import lightning\n    there = 1\nexcept ImportError:\n    there = 0\n"
    (tmp_path / "allowed.py").write_text(trying)
    (tmp_path / "script.py").write_text(
        "import allowed\n\ndef main():\n    try:\n        import lightning\n    except ModuleNotFoundError:\n"
        "        return {'there': allowed.there, 'mine': 0}\n    return {'there': allowed.there, 'mine': 1}\n"
    )
    command = [sys.executable, "-P", child.__file__, str(tmp_path / "script.py"), str(tmp_path / "out.json"), *options]

    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})

    returned = json.loads((tmp_path / "out.json").read_text())["returned"]
    expected = {0: (1, 1), 1: (0, 0), 2: (1, 0)}[len(options)]
    assert (returned["there"], returned["mine"]) == expected


def test_a_row_shows_what_was_refused_and_a_project_that_does_not_run_fails() -> None:
    row = runner.Row(
        "lib", "1.0", "trains", "agrees in 3 values", {"export": "say so. And more"}, {"lightning": 2.4, "fulmen": 1.0}
    )

    assert row.markdown() == "| lib | 1.0 | trains | agrees in 3 values | export: say so. | 2 / 1 |"
    assert runner.Row("lib").failed
    assert "does not run" in runner.Row("lib").markdown()
