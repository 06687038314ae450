"""The README's tables from the runs of nano.sh: python -m tests.benchmarks.tables DIR"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from blip2_jax.monitoring import comparison

SPLITS = ("test_drawing", "test_concept")
ABLATIONS = {
    "seed_0": "the demo, seed 0",
    "without_stage1": "without stage 1",
    "without_itm": "without ITM",
    "without_itg": "without ITG",
    "without_diversity": "without the diversity term",
    "without_begin": "without a token before the soft prompt",
    "random_encoder": "random image encoder",
}
SHOWN = ("text to image R@1, ITC", "caption CIDEr-D", "caption token F1", "category answered", "LM loss, nats a token")
RISE = "its rise with wrong pictures"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head; numbers are aligned to the right."""
    head, *body = rows
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return "\n".join([line(head), line(["---", *["---:"] * (len(head) - 1)]), *map(line, body)])


def numbers(folder: pathlib.Path, split: str) -> dict[str, comparison.Row]:
    """What a run's summary.json says of a split."""
    summary = json.loads((folder / "summary.json").read_text())
    return {row.label: row for row in comparison.rows(summary["splits"][split])}


def baseline(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def seeds(folders: Sequence[pathlib.Path], split: str) -> str:
    """Several runs (mean, smallest, largest) or one, beside the baselines; bold where it is above all of them."""
    runs = [numbers(folder, split) for folder in folders]
    several = ["mean", "from ... to"] if len(runs) > 1 else ["trained"]
    table = [[split, *several, "chance", "majority", "nearest, pooled", "nearest, by token"]]
    for label, row in runs[0].items():
        values = [run[label].value for run in runs]
        mean = float(np.mean(values))
        known = [b for b in row.baselines if b is not None]
        shown = f"**{mean:.3f}**" if known and mean > max(known) else f"{mean:.3f}"
        spread = [f"{min(values):.3f} ... {max(values):.3f}"] if len(runs) > 1 else []
        table.append([label, shown, *spread, *map(baseline, row.baselines)])
    return markdown(table)


def ablations(directory: pathlib.Path, split: str) -> str:
    """One row a run, the numbers that tell them apart."""
    table = [[split, *SHOWN, RISE]]
    for name, title in ABLATIONS.items():
        if (directory / name / "summary.json").exists():
            row = numbers(directory / name, split)
            table.append([title, *(f"{row[label].value:.3f}" if label in row else "" for label in (*SHOWN, RISE))])
    return markdown(table)


def main(directory: pathlib.Path) -> None:
    for pattern in ("seed_*", "long"):
        folders = sorted(folder for folder in directory.glob(pattern) if (folder / "summary.json").exists())
        for split in SPLITS if folders else ():
            print(f"{seeds(folders, split)}\n")
    for split in SPLITS:
        print(f"{ablations(directory, split)}\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
