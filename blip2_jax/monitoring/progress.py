"""What a person sees while it runs: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from blip2_jax.monitoring.clock import duration
from blip2_jax.monitoring.metrics import EVALUATION


def progress(iterable: Any = None, **options: Any) -> tqdm:
    """A tqdm bar on stderr; where that is no terminal it is printed every 15 seconds, and passing bars not at all."""
    live = sys.stderr.isatty()
    options.setdefault("disable", not live and options.get("leave") is False)
    settings = {"file": sys.stderr, "dynamic_ncols": live, "mininterval": 0.2 if live else 15.0, "smoothing": 0.1}
    return tqdm(iterable, **(settings | ({} if live else {"ascii": True, "ncols": 100}) | options))


def tell(text: str) -> None:
    """A line on stderr that leaves the bars in a terminal whole."""
    tqdm.write(text, file=sys.stderr)


class TrainingProgress:
    """A bar in a terminal, and elsewhere a line for each logged step."""

    def __init__(self, name: str, total: int, done: int) -> None:
        """Of a run called `name`, with `done` of its `total` steps behind it."""
        self._name, self._total, self._live = name, total, sys.stderr.isatty()
        self._bar = progress(total=total, initial=done, desc=name, unit="step", disable=not self._live)

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def step(self) -> None:
        """One more step is on its way."""
        self._bar.update()

    def logged(self, row: Mapping[str, Any]) -> None:
        """Show a row of metrics."""
        if self._live:
            self._bar.set_postfix_str(_losses(row), refresh=False)
        else:
            tell(f"{self._name} step {row['step']}/{self._total}: {line(row)}")
        for text in evaluated(row):
            tell(f"{self._name} step {row['step']}/{self._total}, {text}")


_percent = "{:.1%}".format
_SHOWN = {
    "itm_accuracy_positive": ("itm accuracy positive", _percent),
    "itm_accuracy_negative": ("negative", _percent),
    "temperature": ("temperature", "{:.4f}".format),
    "gradient_norm": ("gradient norm", "{:.3g}".format),
    "learning_rate": ("learning rate", "{:.3g}".format),
    "timing/images_per_second": ("images/s", "{:.1f}".format),
    "timing/images_per_second_per_chip": ("a chip", "{:.1f}".format),
    "timing/flops_per_second_per_chip": ("TFLOP/s a chip", lambda value: f"{value / 1e12:.3g}"),
    "timing/mfu": ("MFU", _percent),
    "timing/data_share": ("data wait", _percent),
    "timing/seconds_left": ("left", duration),
}


def line(row: Mapping[str, Any]) -> str:
    """What matters of a row of metrics, on one line; what the row does not have is left out."""
    shown = [_losses(row)]
    if row.get("skipped_steps"):
        shown.append(f"skipped {row['skipped_steps']}")
    shown += [f"{label} {text(row[name])}" for name, (label, text) in _SHOWN.items() if row.get(name) is not None]
    return ", ".join(shown)


def evaluated(row: Mapping[str, Any]) -> list[str]:
    """A line for each source that a row has an evaluation of; of recalls the first alone."""
    sources: dict[str, list[str]] = {}
    for name, value in row.items():
        found = re.fullmatch(EVALUATION, name)
        if found and not re.search(r"/r(5|10)$", name):
            sources.setdefault(found[1], []).append(f"{found[2]} {_loss(value)}")
    return [f"{source}: {', '.join(values)}" for source, values in sources.items()]


def _losses(row: Mapping[str, Any]) -> str:
    """The loss and, in brackets, its terms."""
    terms = [f"{name[5:]} {_loss(value)}" for name, value in row.items() if name.startswith("loss_")]
    return f"loss {_loss(row.get('loss'))}" + (f" ({', '.join(terms)})" if terms else "")


def _loss(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.3f}"
