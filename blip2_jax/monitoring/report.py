"""report.html: what a run or the demo learnt, on one self-contained page."""

from __future__ import annotations

import base64
import contextlib
import html
import json
import math
import pathlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip2_jax import files
from blip2_jax.data.records import BadRecord
from blip2_jax.data.sources import open_source
from blip2_jax.monitoring.metrics import read_metrics

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c1e21;max-width:1080px;margin:2em auto;padding:0 1em;background:#fff}
h1,h2,h3{line-height:1.2} h2{margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse;margin:1em 0} td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #eee}
td:first-child,th:first-child{text-align:left} .below{color:#b3261e} .grid{display:flex;flex-wrap:wrap;gap:14px}
.card{width:150px;font-size:13px} .card img{width:72px;height:72px;display:block} .right{color:#146c2e}
.wrong{color:#b3261e} .row{display:flex;align-items:center;gap:10px;margin:6px 0;font-size:13px}
.row img{width:56px;height:56px;border:3px solid transparent;border-radius:6px} .row img.right{border-color:#146c2e}
.row .query{width:230px} .map{position:relative} .map svg{position:absolute;left:3px;top:3px}
.charts{display:flex;flex-wrap:wrap;gap:16px} small{color:#5f6368}
"""
_COLOURS = ("#1a73e8", "#d93025", "#188038", "#e37400", "#9334e6")


class Images:
    """Pictures of sources as inline images, by key."""

    def __init__(self, names: Sequence[str]):
        self._sources = {name: open_source(name) for name in names}
        self._places = {}
        for name, source in self._sources.items():
            for index in range(len(source)):
                with contextlib.suppress(BadRecord):  # What cannot be used is not shown.
                    self._places[name, source[index]["key"]] = index

    def tag(self, name: str, key: str, attributes: str = "") -> str:
        return inline_image(self._sources[name][self._places[name, key]]["image"], attributes)


def inline_image(encoded: bytes, attributes: str = "") -> str:
    """An <img> that has a JPEG, PNG or WebP inside."""
    kind = "webp" if encoded[8:12] == b"WEBP" else "png" if encoded[:4] == b"\x89PNG" else "jpeg"
    return f'<img {attributes} alt="" src="data:image/{kind};base64,{base64.b64encode(encoded).decode()}">'


def chart(title: str, series: Mapping[str, Sequence[tuple[float, float]]], width: int = 340, height: int = 190) -> str:
    """Curves over the steps as an inline SVG; each is drawn pale, with a running mean in full colour."""
    series = {name: curve for name, curve in series.items() if curve}
    points = [point for curve in series.values() for point in curve]
    if not points:
        return ""
    left, bottom = 42, 22
    steps, values = [p[0] for p in points], sorted(p[1] for p in points)
    low, high = min(values[0], 0 if values[0] >= 0 and values[0] < values[-1] / 3 else values[0]), values[-1]
    high = high if high > low else low + 1
    first, last = min(steps), max(max(steps), min(steps) + 1)
    place = lambda step, value: (
        left + (step - first) / (last - first) * (width - left - 8),
        8 + (high - value) / (high - low) * (height - bottom - 8),
    )
    lines, legend = [], []
    for number, (name, curve) in enumerate(series.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        smooth, window = [], max(1, len(curve) // 25)
        for index in range(len(curve)):
            part = [value for _, value in curve[max(0, index - window + 1) : index + 1]]
            smooth.append((curve[index][0], sum(part) / len(part)))
        for points_, opacity in ((curve, 0.25), (smooth, 1)):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points_))
            lines.append(
                f'<polyline fill="none" stroke="{colour}" opacity="{opacity}" stroke-width="1.6" points="{path}"/>'
            )
        legend.append(f'<tspan fill="{colour}">{html.escape(name)} {smooth[-1][1]:.3g}  </tspan>')
    ticks = "".join(
        f'<text x="{left - 5}" y="{place(first, value)[1] + 4:.0f}" text-anchor="end">{value:.3g}</text>'
        f'<path d="M{left} {place(first, value)[1]:.0f}H{width - 8}" stroke="#eee"/>'
        for value in (low, (low + high) / 2, high)
    )
    feet = (
        f'<text x="{left}" y="{height - 6}">{first:g}</text>'
        f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">step {last:g}</text>'
    )
    return (
        f'<figure style="margin:0"><b>{html.escape(title)}</b><br><svg width="{width}" height="{height + 18}" '
        f'font-size="11" font-family="sans-serif" fill="#5f6368">{ticks}{feet}{"".join(lines)}'
        f'<text x="{left}" y="{height + 12}" font-size="12">{"".join(legend)}</text></svg></figure>'
    )


def curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Losses by term, ITM accuracies, temperature, gradient norm and learning rate of a metrics.jsonl."""
    names = sorted({name for row in metrics for name in row})
    series = lambda chosen: {n: [(r["step"], r[n]) for r in metrics if r.get(n) is not None] for n in chosen}
    charts = [chart(name.replace("_", " "), {"": series([name])[name]}) for name in names if name.startswith("loss")]
    accuracies = [name for name in names if name.startswith("itm_accuracy")]
    if accuracies:
        renamed = {name.rpartition("_")[2]: curve for name, curve in series(accuracies).items()}
        charts.append(chart("itm accuracy", renamed))
    charts += [
        chart(n.replace("_", " "), {"": series([n])[n]})
        for n in ("temperature", "gradient_norm", "learning_rate")
        if n in names
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def evaluation_curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """What evaluations during the run found, one chart a metric, one curve a source; empty if there was only one."""
    charts: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in metrics:
        for name, value in row.items():
            # A source may be a path with slashes; what follows it begins with the kind of evaluation.
            found = re.fullmatch(r"eval/(.+?)/((?:retrieval|caption|question)/.+)", name)
            if found and value is not None and not re.search(r"/r(5|10)$", name):
                charts[found[2]][found[1]].append((row["step"], value))
    if all(len(curve) < 2 for chart_ in charts.values() for curve in chart_.values()):
        return ""
    return f'<div class="charts">{"".join(chart(name, series) for name, series in charts.items())}</div>'


def _retrieval(name: str, samples: Sequence[Mapping[str, Any]], images: Images, shown: int) -> str:
    """Captions with the pictures found first, half of them found right and half wrong."""
    texts = [sample for sample in samples if sample["kind"] == "text_to_image"]
    right = [sample for sample in texts if sample["right"][0]]
    wrong = [sample for sample in texts if not sample["right"][0]]
    rows = []
    for title, group in (("found at once", right), ("something else came first", wrong)):
        rows.append(f"<h4>{title} ({len(group)} of {len(texts)})</h4>")
        for sample in _spread(group, shown):
            pictures = "".join(
                images.tag(name, key, 'class="right"' if ok else "")
                for key, ok in zip(sample["found"], sample["right"], strict=True)
            )
            rows.append(f'<div class="row"><span class="query">{html.escape(sample["text"])}</span>{pictures}</div>')
    return "".join(rows)


def _captions(name: str, samples: Sequence[Mapping[str, Any]], images: Images, shown: int) -> str:
    """A grid of pictures with their true and their generated captions, and answers."""
    cards = []
    for sample in _spread([sample for sample in samples if sample["kind"] == "caption"], shown):
        kind = "right" if sample["generated"] == sample["text"] else "wrong"
        answer = ""
        if "answer" in sample:
            judged = "right" if sample["answer"] == sample["category"] else "wrong"
            answer = f'<br><small>category? <span class="{judged}">{html.escape(sample["answer"])}</span></small>'
        cards.append(
            f'<div class="card">{images.tag(name, sample["key"])}{html.escape(sample["text"])}'
            f'<br><span class="{kind}">{html.escape(sample["generated"]) or "(nothing)"}</span>{answer}</div>'
        )
    return f'<div class="grid">{"".join(cards)}</div>'


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, evenly spread."""
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(min(count, len(items)))]


def examples(samples: Mapping[str, Sequence[Mapping[str, Any]]], shown: int = 40) -> str:
    """What the evaluators found, source by source."""
    images, parts = Images(list(samples)), []
    for name, found in samples.items():
        kinds = {sample["kind"] for sample in found}
        if "text_to_image" in kinds:
            parts.append(
                f"<h3>Retrieval on {html.escape(name)}, by ITC</h3>" + _retrieval(name, found, images, shown // 5)
            )
        if "caption" in kinds:
            title = f"<h3>Captions of {html.escape(name)}</h3><p><small>black: true; below: generated</small></p>"
            parts.append(title + _captions(name, found, images, shown))
    return "".join(parts)


def attention(name: str, samples: Sequence[Mapping[str, Any]]) -> str:
    """Some pictures of a source, each with one map a query: the brighter, the more the query looks there.

    Args:
      name: of the source.
      samples: of `evaluation.attention.samples`. Image tokens that form no square are left out.
    """
    images, rows = Images([name]), []
    for sample in samples:
        side = math.isqrt(sample["weights"].shape[-1])
        if side * side != sample["weights"].shape[-1]:
            continue
        picture = images.tag(name, sample["key"])
        maps = "".join(_attention_map(picture, query.reshape(side, side)) for query in sample["weights"])
        rows.append(
            f'<div class="row"><span class="query">{html.escape(sample["caption"])}</span>{picture}{maps}</div>'
        )
    return "".join(rows)


def _attention_map(picture: str, weights: np.ndarray, size: int = 56) -> str:
    """A picture under a shade that lets through what `weights`, float[side, side], looks at."""
    cell = size / len(weights)
    shade = "".join(
        f'<rect x="{x * cell:.1f}" y="{y * cell:.1f}" width="{cell:.1f}" height="{cell:.1f}" '
        f'opacity="{0.85 * (1 - weights[y, x] / weights.max()):.2f}"/>'
        for y, x in np.ndindex(weights.shape)
    )
    return f'<span class="map">{picture}<svg width="{size}" height="{size}">{shade}</svg></span>'


def page(title: str, body: str, style: str = "") -> str:
    """A whole HTML page that needs nothing else; `style` is CSS beyond that of all pages."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}{style}</style><h1>{html.escape(title)}</h1>{body}</html>"
    )


def write(file: pathlib.Path, title: str, body: str, style: str = "") -> None:
    """Write a page, whole or not at all."""
    files.write_text(file, page(title, body, style))


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"


def write_run(workdir: pathlib.Path) -> None:
    """WORKDIR/report.html from its metrics and its newest samples."""
    config = json.loads((workdir / "config.json").read_text())
    metrics = read_metrics(workdir / "metrics.jsonl")
    body = f"<h2>Training</h2>{curves(metrics)}"
    evaluated = [row for row in metrics if any(name.startswith("eval/") for name in row)]
    if evaluated:
        last = evaluated[-1]
        rows = "".join(
            f"<tr><td>{html.escape(name.removeprefix('eval/'))}</td><td>{_number(value)}</td></tr>"
            for name, value in last.items()
            if name.startswith("eval/")
        )
        body += f"{evaluation_curves(metrics)}<h2>Evaluation at step {last['step']}</h2><table>{rows}</table>"
        samples = json.loads((workdir / "samples" / f"{last['step']}.json").read_text())
        body += f"<h2>Examples</h2>{examples(samples)}"
    body += f"<h2>Configuration</h2><pre>{html.escape(json.dumps(config, indent=2))}</pre>"
    write(workdir / "report.html", f"{config['task']} in {workdir.name}", body)
