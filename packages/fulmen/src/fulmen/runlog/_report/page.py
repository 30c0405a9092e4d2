"""The page's text: what a person wants to know of a run, from the outcome down to the versions."""

from __future__ import annotations

import math
import os
import shlex
from html import escape
from typing import TYPE_CHECKING, cast

from fulmen.runlog._record import Record, number
from fulmen.runlog._report import figures
from fulmen.runlog._report.style import STYLE
from fulmen.runlog._report.svg import COLOURS, chart
from fulmen.runlog._report.text import amount, bytes_text, date, duration, short

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fulmen.runlog._reader import RunLog
    from fulmen.runlog._report.figures import Figure

__all__ = ["page"]

_STAGES = (
    "training",
    "waiting for data",
    "validation",
    "checkpoints",
    "setup",
    "sanity check",
    "test",
    "predict",
    "loggers",
)
_WORDS = {
    "success": "finished",
    "failed": "failed",
    "finished": "handed on",
    "unfinished": "running or killed",
}
_SHOWN_CHECKPOINTS = 12


def page(log: RunLog) -> str:
    """The whole HTML document."""
    begin = log.begins[0] if log.begins else {}
    last = log.begins[-1] if log.begins else {}
    name = str(begin.get("module", "run")).rsplit(".", 1)[-1]
    title = f"{name} · {os.path.basename(os.path.dirname(log.path)) or 'run'}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>",
        _head(log, name, begin, last),
        _tiles(log, last),
        _curves("Metrics", figures.metrics(log)),
        _curves(
            "How it ran",
            [one for one in (figures.learning_rates(log), figures.throughput(log), figures.memory(log)) if one],
        ),
        _time(log),
        _checkpoints(log),
        _configuration(log, last),
        f"<footer>Made from <code>{escape(log.path)}</code> by fulmen. Make it again with "
        f"<code>fulmen log report {escape(shlex.quote(os.path.dirname(log.path)))}</code>.</footer>",
        "</main></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _head(log: RunLog, name: str, begin: Record, last: Record) -> str:
    status = log.status
    where = [
        f"{date(float(cast('float', begin['t'])))}" if "t" in begin else "",
        f"{last['world_size']} \u00d7 {last['device']}" if int(cast("int", last.get("world_size", 1))) > 1 else "",
        str(last.get("device", "")) if int(cast("int", last.get("world_size", 1))) == 1 else "",
        str(last.get("strategy", "")),
        str(last.get("precision", "")),
        str(last.get("host", "")),
    ]
    parts = [
        f'<header><h1>{escape(name)}</h1><span class="badge {status}">{_WORDS.get(status, status)}</span></header>',
        f'<p class="sub">{escape(" · ".join(part for part in where if part))}</p>',
    ]
    error = log.ends[-1].get("error") if log.ends and status == "failed" else None
    if error:
        parts.append(f'<p class="error">{escape(str(error))}</p>')
    if status == "unfinished":
        parts.append('<p class="note">The run has not said how it ended: it is still going on, or it was killed.</p>')
    return "\n".join(parts)


def _tiles(log: RunLog, last: Record) -> str:
    tiles: list[tuple[str, str]] = []
    total = sum(log.stages.values()) or sum(float(cast("float", end.get("seconds", 0))) for end in log.ends)
    if total:
        tiles.append((duration(total), "run time"))
    steps = max((int(cast("int", row.record.get("at", 0))) for row in log.rows), default=0)
    if steps:
        tiles.append((amount(steps), "steps"))
    epochs = [
        value
        for row in log.rows
        if (value := number(cast("Mapping[str, object]", row.record["values"]).get("epoch"))) is not None
    ]
    if epochs:
        tiles.append((amount(int(max(epochs)) + 1), "epochs"))
    speed = figures.throughput(log)
    if speed is not None:
        values = sorted(value for _, value in speed.curves[0].points)
        tiles.append((short(float(f"{values[len(values) // 2]:.3g}")), "steps per second"))
    best = figures.best_checkpoint(log)
    if best is not None and isinstance(best.get("best_score"), float):
        tiles.append((short(cast("float", best["best_score"])), f"best {best['monitor']}"))
    if "parameters" in last:
        tiles.append((_short_count(int(cast("int", last["parameters"]))), "parameters"))
    held = figures.memory(log)
    if held is not None:
        peak = max(value for _, value in held.curves[-1].points)
        tiles.append((bytes_text(peak), f"memory ({held.curves[-1].name.split(',')[0]})"))
    inner = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles)
    return f'<div class="tiles">{inner}</div>' if inner else ""


def _short_count(count: int) -> str:
    for limit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {letter}"
    return str(count)


def _curves(heading: str, drawn: Iterable[Figure]) -> str:
    cards = "".join(_card(figure) for figure in drawn)
    return f'<h2>{heading}</h2><div class="charts">{cards}</div>' if cards else ""


def _card(figure: Figure) -> str:
    keys = "".join(
        f'<span class="key" style="--c:var(--c{index % COLOURS})"><i></i>{escape(curve.name)} '
        f"<b>{escape(bytes_text(curve.points[-1][1]) if figure.is_bytes else short(curve.points[-1][1]))}</b></span>"
        for index, curve in enumerate(figure.curves)
    )
    bad = sum(not math.isfinite(value) for curve in figure.curves for _, value in curve.points)
    remark = f'<span class="key failed">{bad} not finite</span>' if bad else ""
    return (
        f'<figure class="card"><figcaption><h3>{escape(figure.title)}</h3>{keys}{remark}</figcaption>'
        f"{chart(figure)}</figure>"
    )


def _time(log: RunLog) -> str:
    total = sum(log.stages.values())
    if not total:
        return ""
    order = sorted(log.stages, key=lambda name: _STAGES.index(name) if name in _STAGES else len(_STAGES))
    shown = [(name, log.stages[name]) for name in order if log.stages[name] > 0]
    bar = "".join(
        f'<span style="--c:var(--c{index % COLOURS});flex:{seconds / total:.5f}" title="{escape(name)}"></span>'
        for index, (name, seconds) in enumerate(shown)
    )
    legend = "".join(
        f'<li style="--c:var(--c{index % COLOURS})"><i></i>{escape(name)}'
        f"<em>{escape(duration(seconds))} · {seconds / total:.1%}</em></li>"
        for index, (name, seconds) in enumerate(shown)
    )
    return (
        f'<h2>Where the time went</h2><div class="card"><div class="bar">{bar}</div>'
        f'<ul class="legend">{legend}</ul></div>'
    )


def _checkpoints(log: RunLog) -> str:
    if not log.checkpoints:
        return ""
    best = figures.best_checkpoint(log)
    best_path = None if best is None else best.get("best")
    rows: list[str] = []
    latest = {str(record["path"]): record for record in log.checkpoints}
    chosen = list(latest.values())[-_SHOWN_CHECKPOINTS:]
    if best_path in latest and latest[str(best_path)] not in chosen:
        chosen.insert(0, latest[str(best_path)])
    for record in reversed(chosen):
        score = number(record.get("score"))
        what = f"{record['monitor']} {short(score)}" if score is not None and record.get("monitor") else ""
        star = '<span class="star">best</span>' if record["path"] == best_path else ""
        rows.append(
            f'<tr><td class="num">{escape(amount(int(cast("int", record.get("at", 0)))))}</td>'
            f"<td>{escape(os.path.basename(str(record['path'])))}</td><td>{escape(what)}</td><td>{star}</td></tr>"
        )
    more = len(latest) - len(chosen)
    folder = os.path.dirname(str(chosen[-1]["path"]))
    note = f" and {more} earlier ones" if more else ""
    return (
        '<h2>Checkpoints</h2><div class="card"><div class="scroll"><table><tr><th>step</th><th>file</th><th>score</th>'
        f'<th></th></tr>{"".join(rows)}</table></div><p class="sub" style="margin:10px 0 0">In '
        f"<code>{escape(folder)}</code>{note}; some may have been replaced by better ones.</p></div>"
    )


def _configuration(log: RunLog, last: Record) -> str:
    settings = cast("Mapping[str, object]", last.get("settings", {}))
    versions = cast("Mapping[str, object]", last.get("versions", {}))
    command = cast("list[str]", last.get("command", []))
    environment: dict[str, object] = {
        "command": shlex.join(command),
        "working folder": last.get("folder", ""),
        "host": last.get("host", ""),
        "system": last.get("system", ""),
        "device": last.get("device", ""),
        "processes": last.get("world_size", ""),
        "CPU cores": last.get("cpus", ""),
        **versions,
        "loggers": ", ".join(str(name).rsplit(".", 1)[-1] for name in cast("list[object]", last.get("loggers", []))),
        "calls": ", ".join(str(begin.get("fn")) for begin in log.begins),
    }
    model: dict[str, object] = {
        "module": last.get("module", ""),
        "parameters": amount(int(cast("int", last.get("parameters", 0)))),
        "trainable": amount(int(cast("int", last.get("trainable", 0)))),
        "precision": last.get("precision", ""),
        "strategy": last.get("strategy", ""),
    }
    return (
        '<h2>Configuration and environment</h2><div class="two">'
        f'<div class="card"><h3>Hyperparameters</h3>{_table(_flat(log.hparams)) or _NONE}</div>'
        f'<div class="card"><h3>Model</h3>{_table(model)}'
        f"<details><summary>Trainer settings</summary>{_table(settings)}</details></div>"
        f'<div class="card"><h3>Environment</h3>{_table(environment)}</div></div>'
    )


_NONE = '<p class="sub" style="margin:8px 0 0">None were logged: call <code>save_hyperparameters()</code>.</p>'


def _table(values: Mapping[str, object]) -> str:
    rows = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(_shown(value))}</td></tr>"
        for name, value in values.items()
        if value != ""
    )
    return f'<div class="scroll"><table>{rows}</table></div>' if rows else ""


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.10g}"
    return "none" if value is None else str(value)


def _flat(values: Mapping[str, object], above: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        key = f"{above}.{name}" if above else name
        if isinstance(value, dict) and value:
            flat.update(_flat(cast("Mapping[str, object]", value), key))
        else:
            flat[key] = value
    return flat
