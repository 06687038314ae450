"""report.html: what a run or the demo learnt, on one self-contained page."""

from __future__ import annotations

import html
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from blip2_jax import files
from blip2_jax.monitoring import alarms, charts, clock, examples
from blip2_jax.monitoring.metrics import EVALUATION, read_metrics

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c1e21;max-width:1080px;margin:2em auto;padding:0 1em;background:#fff}
h1,h2,h3{line-height:1.2} h2{margin-top:2em;border-bottom:1px solid #ddd} h4{margin:1em 0 .3em}
table{border-collapse:collapse;margin:1em 0} td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #eee}
td:first-child,th:first-child{text-align:left} .below{color:#b3261e} small,.lead{color:#5f6368}
.charts{display:flex;flex-wrap:wrap;gap:16px} summary{cursor:pointer}
.tiles{display:flex;flex-wrap:wrap;gap:8px 34px;margin:1.2em 0} .tiles b{display:block;font-size:21px;font-weight:600}
.alarms{background:#fce8e6;border-left:5px solid #b3261e;border-radius:6px;padding:.6em 1.2em;margin:1em 0}
.alarms b{color:#b3261e} .alarms p{margin:.5em 0} .time{display:flex;height:22px;border-radius:6px;overflow:hidden}
.legend{display:flex;flex-wrap:wrap;gap:4px 22px;margin-top:8px;font-size:13px;color:#5f6368} .legend b{color:#1c1e21}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px} .scroll{overflow-x:auto}
.tables{display:flex;flex-wrap:wrap;gap:0 48px} .tables h3{margin-bottom:0}
.tables table{font-size:13px;margin-top:.4em} .tables td,.tables th{padding:.2em .55em}
"""
_STEPS_SHOWN = 8  # Evaluations side by side in the table.


def page(title: str, body: str, style: str = "") -> str:
    """A whole HTML page that needs nothing else; `style` is CSS beyond that of all pages."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}{style}</style><h1>{html.escape(title)}</h1>{body}</html>"
    )


def write(file: pathlib.Path, title: str, body: str, style: str = "") -> None:
    """Write a page, whole or not at all."""
    files.write_text(file, page(title, body, style))


def write_run(workdir: pathlib.Path) -> None:
    """WORKDIR/report.html from its configuration, its metrics and the samples of its newest evaluation."""
    config = json.loads((workdir / "config.json").read_text())
    metrics = read_metrics(workdir / "metrics.jsonl")
    seconds = clock.totals(metrics)
    body = alarms_held(metrics) + _tiles(metrics, config["total_steps"], seconds)
    body += f"<h2>Training</h2>{charts.curves(metrics)}"
    if any(seconds.values()):
        body += f"<h2>Where the time went</h2>{charts.time_bar(seconds)}"
    evaluations = [row for row in metrics if any(name.startswith("eval/") for name in row)]
    if evaluations:
        body += f"<h2>Evaluations</h2>{_evaluations(evaluations)}{charts.evaluation_curves(metrics)}"
        step = evaluations[-1]["step"]
        samples = json.loads((workdir / "samples" / f"{step}.json").read_text())
        body += f"<h2>Examples at step {step}</h2>{examples.sections(samples)}"
    recipe = html.escape(json.dumps(config, indent=2))
    body += f"<h2>Configuration</h2><details><summary>as it was resolved</summary><pre>{recipe}</pre></details>"
    write(workdir / "report.html", f"{config['task']} in {workdir.name}", body, examples.STYLE)


def alarms_held(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The alarms that hold in the last row, in red, and those that have ended."""
    if not metrics:
        return ""
    last, now, over = metrics[-1]["step"], [], []
    for name, spans in alarms.spans(metrics).items():
        label = name.rpartition("/")[2].replace("_", " ")
        times = ", ".join(f"{first} to {end}" for first, end in spans if end != last)
        if spans[-1][1] == last:
            meaning = re.sub("`(.+?)`", r"<code>\1</code>", html.escape(alarms.DETECTORS[name].meaning))
            now.append(f"<p><b>{label}</b> since step {spans[-1][0]}. {meaning}</p>")
        if times:
            over.append(f"{label} (steps {times})")
    held = f'<div class="alarms">{"".join(now)}</div>' if now else f'<p class="lead">No alarm at step {last}.</p>'
    return held + (f'<p class="lead">Alarms that ended: {"; ".join(over)}.</p>' if over else "")


def _tiles(metrics: Sequence[Mapping[str, Any]], total: int, seconds: Mapping[str, float]) -> str:
    """The newest numbers at a glance."""
    if not metrics:
        return ""
    row = metrics[-1]
    tiles = {"step": f"{row['step']:,} of {total:,}", "loss": _number(row.get("loss"))}
    for label, name, form in (
        ("seconds a step", "timing/step_seconds", "{:.3g}"),
        ("images/s", "timing/images_per_second", "{:,.1f}"),
        ("MFU", "timing/mfu", "{:.1%}"),
        ("data wait", "timing/data_share", "{:.1%}"),
    ):
        if row.get(name) is not None:
            tiles[label] = form.format(row[name])
    if any(seconds.values()):
        tiles["in all"] = clock.duration(sum(seconds.values()))
    return f'<div class="tiles">{"".join(f"<div><b>{text}</b>{name}</div>" for name, text in tiles.items())}</div>'


def _evaluations(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table a source of what each evaluation found, of many the first and the newest ones."""
    rows = rows if len(rows) <= _STEPS_SHOWN else [rows[0], *rows[1 - _STEPS_SHOWN :]]
    tables: dict[str, dict[str, list[str]]] = {}
    for number, row in enumerate(rows):
        for name, value in row.items():
            if found := re.fullmatch(EVALUATION, name):
                cells = tables.setdefault(found[1], {}).setdefault(found[2], [""] * len(rows))
                cells[number] = _number(value)
    heads = "".join(f"<th>step {row['step']}</th>" for row in rows)
    parts = []
    for source, metrics in tables.items():
        lines = "".join(
            f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
            for name, cells in metrics.items()
        )
        table = f"<table><tr><th></th>{heads}</tr>{lines}</table>"
        parts.append(f'<div class="scroll"><h3>{html.escape(source)}</h3>{table}</div>')
    return f'<div class="tables">{"".join(parts)}</div>'


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"
