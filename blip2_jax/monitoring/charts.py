"""Curves of a run, and where its time went, as inline SVG and HTML."""

from __future__ import annotations

import html
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from blip2_jax.monitoring.clock import duration
from blip2_jax.monitoring.metrics import EVALUATION

_COLOURS = ("#1a73e8", "#d93025", "#188038", "#e37400", "#9334e6", "#5f6368")


def chart(title: str, series: Mapping[str, Sequence[tuple[float, float]]], width: int = 335, height: int = 190) -> str:
    """Curves over the steps as an inline SVG; each is drawn pale, with a running mean in full colour."""
    series = {name: curve for name, curve in series.items() if curve}
    points = [point for curve in series.values() for point in curve]
    if not points:
        return ""
    left, bottom = 46, 22
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
        legend.append(f'<span style="color:{colour}">{html.escape(name)} {_short(smooth[-1][1])}</span>')
    ticks = "".join(
        f'<text x="{left - 5}" y="{place(first, value)[1] + 4:.0f}" text-anchor="end">{_short(value)}</text>'
        f'<path d="M{left} {place(first, value)[1]:.0f}H{width - 8}" stroke="#eee"/>'
        for value in (low, (low + high) / 2, high)
    )
    feet = (
        f'<text x="{left}" y="{height - 6}">{first:g}</text>'
        f'<text x="{width - 8}" y="{height - 6}" text-anchor="end">step {last:g}</text>'
    )
    return (
        f'<figure style="margin:0;width:{width}px"><b>{html.escape(title)}</b><br>'
        f'<svg width="{width}" height="{height}" font-size="11" font-family="sans-serif" fill="#5f6368">'
        f"{ticks}{feet}{''.join(lines)}</svg>"
        f'<figcaption style="font-size:12px;margin-left:{left}px">{" ".join(legend)}</figcaption></figure>'
    )


def _short(value: float) -> str:
    """Three digits, in little room."""
    return f"{value:.3g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Losses by term, ITM accuracies, temperature, gradient norm, learning rate and pace of a metrics.jsonl."""
    names = sorted({name for row in metrics for name in row})
    series = lambda chosen: {n: [(r["step"], r[n]) for r in metrics if r.get(n) is not None] for n in chosen}
    charts = [chart(name.replace("_", " "), {"": series([name])[name]}) for name in names if name.startswith("loss")]
    accuracies = [name for name in names if name.startswith("itm_accuracy")]
    if accuracies:
        renamed = {name.rpartition("_")[2]: curve for name, curve in series(accuracies).items()}
        charts.append(chart("itm accuracy", renamed))
    charts += [
        chart(n.removeprefix("timing/").replace("_", " "), {"": series([n])[n]})
        for n in ("temperature", "gradient_norm", "learning_rate", "timing/images_per_second", "timing/mfu")
        if n in names
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def evaluation_curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    """What evaluations during the run found, one chart a metric, one curve a source; empty if there was only one."""
    charts: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in metrics:
        for name, value in row.items():
            found = re.fullmatch(EVALUATION, name)
            if found and value is not None and not re.search(r"/r(5|10)$", name):
                charts[found[2]][found[1]].append((row["step"], value))
    if all(len(curve) < 2 for chart_ in charts.values() for curve in chart_.values()):
        return ""
    return f'<div class="charts">{"".join(chart(name, series) for name, series in charts.items())}</div>'


def time_bar(seconds: Mapping[str, float]) -> str:
    """Seconds by purpose as one bar of a length of 100 %, with a legend."""
    total = sum(seconds.values())
    parts = [
        (name, spent, colour) for (name, spent), colour in zip(seconds.items(), _COLOURS, strict=True) if spent > 0
    ]
    bar = "".join(
        f'<div style="width:{spent / total:.2%};background:{colour}" title="{name}"></div>'
        for name, spent, colour in parts
    )
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{name} <b>{duration(spent)}</b> {spent / total:.1%}</span>'
        for name, spent, colour in parts
    )
    return f'<div class="time">{bar}</div><div class="legend">{legend}</div>'
