"""The page whose picture is the README's figure of nano_long, from the DIR that nano.sh has filled.

python -m tests.benchmarks.curves DIR FILE.html
chromium --headless --window-size=1130,680 --screenshot=FILE.png FILE.html
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence

from blip2_jax.monitoring import charts, report

# Stage, title, and the curves: label -> name in metrics.jsonl.
CHARTS = [
    ("stage1", "stage 1: training losses", {"ITC": "loss_itc", "ITM": "loss_itm", "ITG": "loss_itg"}),
    (
        "stage1",
        "text to image R@1 by ITC",
        {s: f"eval/nano:{s}/retrieval/itc/text_to_image/r1" for s in ("val_drawing", "val_concept")},
    ),
    ("stage2", "stage 2: training loss", {"LM": "loss"}),
    ("stage2", "LM loss", {s: f"eval/nano:{s}/caption/loss" for s in ("val_drawing", "val_concept")}),
    ("stage2", "caption CIDEr-D", {s: f"eval/nano:{s}/caption/cider" for s in ("val_drawing", "val_concept")}),
    ("stage2", "category answered", {s: f"eval/nano:{s}/question/accuracy" for s in ("val_drawing", "val_concept")}),
]


def curves(folder: pathlib.Path) -> str:
    """The charts of a run with both stages, side by side."""

    def chart(stage: str, title: str, names: dict[str, str]) -> str:
        rows: Sequence[dict] = [
            json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()
        ]
        series = {label: [(row["step"], row[name]) for row in rows if name in row] for label, name in names.items()}
        return charts.chart(title, series)

    return f'<div class="charts">{"".join(chart(*each) for each in CHARTS)}</div>'


if __name__ == "__main__":
    pathlib.Path(sys.argv[2]).write_text(report.page("nano_long", curves(pathlib.Path(sys.argv[1]) / "long")))
