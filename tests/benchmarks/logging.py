"""What logging costs: seconds for a logged row, beside those of the steps that it is logged for.

python -m tests.benchmarks.logging [WORKDIR] [--rows 300]

A row is one of a stage-1 run with alarms on; it goes through the clock, the alarms, metrics.jsonl, TensorBoard and the
plain line, as in the trainer. WORKDIR is a finished run, whose rows are logged again and whose median step is what they
are compared with; without one the rows are made up, and a step takes the 4 seconds that nano takes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pathlib
import statistics
import tempfile
import time

from blip2_jax.monitoring.alarms import Alarms, Thresholds
from blip2_jax.monitoring.clock import Clock, Work
from blip2_jax.monitoring.metrics import MetricsWriter, read_metrics
from blip2_jax.monitoring.progress import TrainingProgress

LOSSES = ("loss", "loss_itc", "loss_itm", "loss_itg", "itm_accuracy_positive", "itm_accuracy_negative", "query_cosine")
OTHERS = ("temperature", "gradient_norm", "skipped_steps", "skipped_in_a_row", "itm_rows_without_negative")


def known(workdir: pathlib.Path | None) -> tuple[list[dict], float, int]:
    """Rows without what the clock adds, seconds a step, and steps a row."""
    if workdir is None:
        return [dict.fromkeys((*LOSSES, *OTHERS), 0.6)], 4.0, 5
    rows = read_metrics(workdir / "metrics.jsonl")
    seconds = statistics.median(row["timing/step_seconds"] for row in rows)
    every = json.loads((workdir / "config.json").read_text())["log_every"]
    return [{n: v for n, v in row.items() if not n.startswith(("timing/", "step"))} for row in rows], seconds, every


def measure(rows: list[dict], count: int) -> list[float]:
    """Seconds of each of `count` logged rows."""
    found = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        writer, alarms = MetricsWriter(pathlib.Path(folder), 0), Alarms(Thresholds(), 128, 0)
        clock, to_come = Clock(Work(128, 1, 1e12, 1e14)), {"train": 9, "evaluate": 1, "checkpoint": 1}
        with TrainingProgress("stage1", count, 0) as shown:
            for number in range(1, count + 1):
                began = time.perf_counter()
                with clock.measure("data"):
                    pass
                clock.done(number)
                values = rows[number % len(rows)] | clock.reading(to_come)
                shown.logged({"step": number} | values)
                writer.write(number, values | alarms.add({"step": number} | values))
                found.append(time.perf_counter() - began)
        writer.close()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path, nargs="?")
    parser.add_argument("--rows", type=int, default=300)
    options = parser.parse_args()
    rows, step, every = known(options.workdir)
    seconds = measure(rows, options.rows)
    row = statistics.median(seconds)
    print(f"a logged row: {1e3 * row:.2f} ms in the median, {1e3 * max(seconds):.2f} ms at most")
    print(
        f"of {every} steps of {step:.2f} s: {row / (every * step):.4%}; of each step, were all logged: {row / step:.3%}"
    )
