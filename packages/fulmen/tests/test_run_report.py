"""The page of a run is one file that needs nothing else, says what happened, and looks right in a browser."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fulmen.runlog import read_run, write_report
from fulmen.runlog._report.text import amount, bytes_text, compact, duration, short
from fulmen.runlog._writer import EventLog

if TYPE_CHECKING:
    from collections.abc import Sequence

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")


def make_log(folder: Path, *, rows: int = 300, end: bool = True, values: Sequence[float] = ()) -> Path:
    """A run as a Trainer logs it, with names that would break a careless page."""
    log = EventLog(str(folder / "run.jsonl"))
    about: dict[str, Any] = {
        "module": "zoo.<Net>",
        "parameters": 1_234_567,
        "trainable": 1_000_000,
        "world_size": 1,
        "device": "x86_64",
        "strategy": "single_device",
        "precision": "32-true",
        "command": ["python", "train.py", "--name", "a very long name " * 6],
        "versions": {"python": "3.11", "torch": "2.9"},
        "settings": {"max_epochs": 3},
        "loggers": ["fulmen_loggers.csv.CSVLogger"],
    }
    log.append({"kind": "begin", "t": 1_700_000_000.0, "format": 1, "fn": "fit", **about})
    log.append({"kind": "hparams", "t": 0.0, "values": {"lr": 0.5, "net": {"width": 7}, "note": "<script>x</script>"}})
    log.append({"kind": "position", "t": 0.0, "at": 0})
    for x in range(rows):
        loss = values[x] if x < len(values) else 2.0 * math.exp(-x / 100) + 0.1 * math.sin(x)
        named = {"train_loss": loss, "<img src=x>": float(x), "epoch": x // 100}
        log.append({"kind": "metrics", "t": 1_700_000_000.0 + x, "x": x, "at": x + 1, "of": "step", "values": named})
        if x % 5 == 0:
            state = {"at": x + 1, "training_s": x * 0.01, "lr": {"SGD": 0.1}, "memory": {"host": 2**30 + x * 2**20}}
            log.append({"kind": "state", "t": 0.0, **state})
        if x % 100 == 99:
            named = {"val_loss": 1.0 / (x + 1), "epoch": x // 100}
            log.append({"kind": "metrics", "t": 0.0, "x": x + 1, "at": x + 1, "of": "epoch", "values": named})
            found = {"path": f"ckpt/epoch={x // 100}.ckpt", "at": x + 1, "monitor": "val_loss", "score": 1.0 / (x + 1)}
            best = {"best": found["path"], "best_score": found["score"]}
            log.append({"kind": "checkpoint", "t": 0.0, **found, **best})
    log.append({"kind": "stages", "t": 0.0, "seconds": {"training": 90.0, "validation": 9.0, "setup": 1.0}})
    if end:
        log.append({"kind": "end", "t": 0.0, "status": "success", "seconds": 100.0})
    log.close()
    return folder


class Read(HTMLParser):
    """The elements, their attributes and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "circle", "path", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open and self.open.pop() != tag:
            raise AssertionError(f"</{tag}> closes something else")

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def read(folder: Path) -> Read:
    return Read(Path(write_report(str(folder))).read_text(encoding="utf-8"))


def test_the_page_is_whole_and_asks_nobody_for_anything(tmp_path: Path) -> None:
    page = Path(write_report(str(make_log(tmp_path)))).read_text(encoding="utf-8")
    found = Read(page)

    assert found.open == [], "every element is closed"
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object"}
    assert not [attrs for _, attrs in found.tags if attrs.keys() & {"src", "href", "srcset"}]
    assert "url(" not in page
    assert "@import" not in page
    assert "http" not in page


def test_the_page_says_what_people_want_to_know(tmp_path: Path) -> None:
    found = read(make_log(tmp_path))

    for text in (
        "<Net>", "finished", "train_loss", "val_loss", "<img src=x>", "learning rate", "steps per second", "memory",
        "1 min 40 s", "1.23 M", "training", "1 min 30 s · 90.0%", "epoch=2.ckpt", "best", "val_loss 0.003333",
        "net.width", "<script>x</script>", "max_epochs", "torch", "CSVLogger", "3.11",
    ):  # fmt: skip
        assert text in found.text, text
    curves = [attrs for tag, attrs in found.tags if tag == "path" and attrs.get("class") == "line"]
    assert len(curves) == 6, "train_loss, val_loss, the odd one, rate, steps a second, memory"


def test_losses_of_training_and_validation_share_a_picture_with_the_best_checkpoint_marked(tmp_path: Path) -> None:
    page = Path(write_report(str(make_log(tmp_path)))).read_text(encoding="utf-8")
    figure = next(text for text in page.split("<figure")[1:] if ">loss<" in text)

    assert "train_loss" in figure
    assert "val_loss" in figure
    assert figure.count('class="best"') == 1


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def test_curves_are_drawn_where_the_values_are(tmp_path: Path) -> None:
    values = [1.0, 3.0, 2.0, 5.0]
    found = read(make_log(tmp_path, rows=4, values=values))
    line = next(attrs["d"] for tag, attrs in found.tags if tag == "path" and attrs.get("class") == "line")
    drawn = points(str(line))

    # An affine picture: x grows evenly, y shrinks in proportion to the value.
    steps = [b[0] - a[0] for a, b in itertools.pairwise(drawn)]
    assert max(steps) - min(steps) < 0.21
    scale = (drawn[1][1] - drawn[0][1]) / (values[1] - values[0])
    assert scale < 0
    for (_, y), value in zip(drawn, values, strict=True):
        assert y == pytest.approx(drawn[0][1] + scale * (value - values[0]), abs=0.2)


def test_a_spike_among_very_many_points_is_still_there(tmp_path: Path) -> None:
    values = [1.0] * 5000
    values[3210] = 9.0
    found = read(make_log(tmp_path, rows=5000, values=values))
    raw = next(attrs["d"] for tag, attrs in found.tags if tag == "path" and attrs.get("class") == "line raw")
    heights = [y for _, y in points(str(raw))]

    assert len(heights) < 1000, "the page stays small"
    assert min(heights) < 0.3 * max(heights)


def test_what_is_not_finite_is_marked_and_breaks_the_line(tmp_path: Path) -> None:
    page = Path(write_report(str(make_log(tmp_path, rows=6, values=[1, 2, math.nan, 3, math.inf, 4])))).read_text()
    figure = next(text for text in page.split("<figure")[1:] if ">loss<" in text)

    assert "2 not finite" in figure
    assert figure.count('class="bad"') == 2
    line = re.search(r'class="line"[^>]*d="([^"]+)"', figure)
    assert line is not None
    assert line[1].count("M") == 3
    assert "nan" not in line[1]


@pytest.mark.parametrize("constant", [0.0, 5.0, -2.0, 1e-30, 1e30])
def test_a_constant_has_a_picture(tmp_path: Path, constant: float) -> None:
    found = read(make_log(tmp_path, rows=3, values=[constant] * 3))

    assert any(attrs.get("class") == "line" for _, attrs in found.tags)


def test_a_run_without_an_end_or_without_anything_has_a_page(tmp_path: Path) -> None:
    assert "running or killed" in read(make_log(tmp_path / "dead", rows=3, end=False)).text
    EventLog(str(tmp_path / "empty" / "run.jsonl")).close()
    assert "running or killed" in read(tmp_path / "empty").text
    assert read_run(str(tmp_path / "empty")).rows == []


def test_the_page_can_go_elsewhere(tmp_path: Path) -> None:
    target = tmp_path / "page.html"

    assert write_report(str(make_log(tmp_path, rows=3)), str(target)) == str(target)
    assert target.exists()
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (short, 0.0, "0"), (short, 1234.5678, "1235"), (short, -0.25, "\u22120.25"), (short, 2.5e-7, "2.5e\u22127"),
        (short, math.nan, "NaN"), (short, -math.inf, "\u2212\u221e"), (compact, 1500, "1.5k"), (compact, 2e7, "20M"),
        (amount, 1234567, "1\u2009234\u2009567"), (duration, 0.0123, "12 ms"), (duration, 4.25, "4.2 s"),
        (duration, 65, "1 min 5 s"), (duration, 3 * 3600 + 720, "3 h 12 min"), (duration, 90000, "1 d 1 h"),
        (bytes_text, 512, "512 B"), (bytes_text, 1536, "1.5 KiB"), (bytes_text, 3 * 2**30, "3.0 GiB"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_people_read_them(function: Any, value: float, text: str) -> None:
    assert function(value) == text


# ---------------------------------------------------------------------- in a browser


def browser() -> str:
    found = os.environ.get("CHROME") or next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(_BROWSERS)} is on the PATH, and CHROME is not set")
    return found


_MEASURE = """<script>
addEventListener("load", () => {
  const page = document.getElementById("page").contentDocument, root = page.documentElement;
  const wide = [...page.querySelectorAll("main *")].filter(e => !e.closest("svg,.scroll") &&
    e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.tagName + "." + e.className);
  const small = [...page.querySelectorAll("svg text")].filter(e => e.getBoundingClientRect().height < 8).length;
  const cards = new Set([...page.querySelectorAll(".charts .card")].map(e => Math.round(e.getBoundingClientRect().x)));
  document.title = JSON.stringify({overflow: root.scrollWidth - root.clientWidth, wide, small, columns: cards.size,
    background: getComputedStyle(page.body).backgroundColor, ink: getComputedStyle(page.body).color});
});
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "columns"), [(1240, 3), (390, 1)])
def test_a_browser_shows_it_without_scrolling_sideways_on_a_desk_and_on_a_phone(
    tmp_path: Path, width: int, columns: int
) -> None:
    import json

    chrome = browser()
    write_report(str(make_log(tmp_path)))
    frame = tmp_path / "frame.html"
    frame.write_text(f'<iframe id="page" src="report.html" width="{width}" height="3000"></iframe>{_MEASURE}')

    shown = subprocess.run(
        [chrome, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom",
         "--window-size=1400,3000", "--virtual-time-budget=5000", f"--user-data-dir={tmp_path / 'profile'}",
         frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip

    title = re.search(r"<title>(.*?)</title>", shown.stdout)
    assert title is not None, shown.stderr
    found = json.loads(title[1])
    assert found["overflow"] == 0
    assert found["wide"] == []
    assert found["small"] == 0, "letters in the pictures can be read"
    assert found["columns"] == columns
    assert found["background"] != found["ink"]
