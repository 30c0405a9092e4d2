"""The runner of Markdown's Python blocks."""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import dedent

from tools.readme import blocks, main, run, script


def page(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(dedent(text), encoding="utf-8")
    return path


def test_blocks_run_in_order_in_one_process_and_share_their_names(tmp_path: Path) -> None:
    path = page(
        tmp_path,
        """
        ```python
        x = 20
        ```
        words
        ```python
        print(x + 22)
        ```
        """,
    )

    result = run(path, sys.executable)

    assert result.stdout.strip() == "42"


def test_only_blocks_fenced_as_python_run(tmp_path: Path) -> None:
    path = page(tmp_path, "```py\nraise SystemExit(1)\n```\n```text\nno code\n```\n```python\nprint('ran')\n```\n")

    assert [code for _, code in blocks(path.read_text())] == ["print('ran')\n"]


def test_an_indented_block_loses_the_indentation_of_its_fence(tmp_path: Path) -> None:
    path = page(tmp_path, "- a list\n\n    ```python\n    if True:\n        print('in')\n    ```\n")

    result = run(path, sys.executable)

    assert (result.returncode, result.stdout.strip()) == (0, "in")


def test_a_traceback_points_to_the_line_of_the_page(tmp_path: Path) -> None:
    path = page(tmp_path, "one\ntwo\n```python\nx = 1\n\n1 / 0\n```\n")

    result = run(path, sys.executable)

    assert "line 6" in result.stderr
    assert "ZeroDivisionError" in result.stderr
    assert script(path).split("\n")[5] == "1 / 0"


def test_a_page_that_fails_or_has_too_few_blocks_is_an_error(tmp_path: Path, capfd: object) -> None:
    good = page(tmp_path, "```python\npass\n```\n")
    empty = tmp_path / "empty.md"
    empty.write_text("no code\n")
    bad = tmp_path / "bad.md"
    bad.write_text("```python\nraise ValueError('told')\n```\n")

    assert main([str(good), str(empty)]) == 0
    assert main(["--at-least=1", str(empty)]) == 1
    assert main([str(bad)]) == 1
