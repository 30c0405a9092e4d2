"""An example that misses the score it states is an error, and so is one that fails or says no score."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tools.examples
from tools.examples import EXAMPLES, SCRIPTS, Example, Goal, Missed, main, run

GOAL = Goal(r"Score: ([\d.]+)", least=0.5)


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tools.examples, "RESULTS", tmp_path / "results")
    texts = {
        "good": "import sys\nprint('Score: 0.1')\nprint('Score: 0.7', *sys.argv[1:])\nopen('made.txt', 'w')",
        "bad": "print('Score: 0.4')",
        "silent": "",
        "broken": "raise LookupError('no data')",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def test_the_last_score_counts_and_files_go_to_a_folder_of_its_own(
    scripts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = Example("good", (GOAL,), arguments=("--fast",))

    assert main([], (example,), scripts) == 0

    assert "Score: 0.7 --fast" in capsys.readouterr().out
    assert (scripts / "results" / "good" / "made.txt").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bad", r"bad misses its goal: 0.4 is less than 0.5"),
        ("silent", r"silent misses its goal: nothing that was printed matches"),
        ("broken", r"(?s)broken ended with exit status 1.*LookupError: no data"),
    ],
)
def test_what_misses_its_goal_or_fails_is_an_error_and_the_others_still_run(
    name: str, said: str, scripts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Missed, match=said):
        run(Example(name, (GOAL,)), scripts, scripts)

    assert main([], (Example(name, (GOAL,)), Example("good", (GOAL,))), scripts) == 1

    assert "Score: 0.7" in capsys.readouterr().out


def test_a_goal_may_be_a_most() -> None:
    loss = Goal(r"loss ([\d.]+)", most=1.5)

    assert loss.judge("loss 1.5") is None
    assert loss.judge("loss 1.6") == r"1.6 is more than 1.5 (loss ([\d.]+))"


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"no example is named nothing; there are: .*fabric/gan"):
        main(["nothing"])


def test_every_example_has_a_goal_which_its_page_states() -> None:
    page = (SCRIPTS / "index.md").read_text(encoding="utf-8")
    scripts = {str(path.relative_to(SCRIPTS).with_suffix("")) for path in SCRIPTS.rglob("*.py")} - {"curves"}

    assert {example.name for example in EXAMPLES} == scripts
    for example in EXAMPLES:
        [row] = [line for line in page.splitlines() if f"`{example.name}.py`" in line]
        stated = [float(number) for number in re.findall(r"[\d.]+", row.split("|")[4])]
        expected = [limit for goal in example.goals for limit in (goal.least, goal.most) if limit is not None]
        assert stated == expected, example.name
