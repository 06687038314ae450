"""A training step of nano with the encoder in it, and with image tokens that were computed before.

python -m tests.benchmarks.cached_features [--steps 5] [--rounds 3]

Both sides are the trainer's own step with the batches it makes, in turns; what is compared is the processor time of a
step, which other work on the machine hardly changes, from asking for the batch to the end of the step.
"""

from __future__ import annotations

import argparse
import pathlib
import runpy
import tempfile
import time

import jax
import numpy as np

from blip2_jax import trainer
from blip2_jax.parallel import mesh as meshes
from tests.benchmarks.tables import markdown

VIEWS = {"encoder in the step": 0, "tokens from the cache": 4}


def start(stage: str, views: int, workdir: pathlib.Path) -> trainer.Run:
    """A run of nano that has done its first step."""
    config = runpy.run_path(str(pathlib.Path("configs") / f"{stage}.py"))["get_config"]()
    changes = {"data.feature_views": views, "data.eval": "", "init": "" if stage == "stage1" else "scratch"}
    config.update_from_flattened_dict(changes)
    run = trainer.Run(config, workdir)
    step(run)
    return run


def step(run: trainer.Run) -> None:
    batch = meshes.global_batch(next(run.data).batch, run.config.batch_size, run.mesh)
    with jax.set_mesh(run.mesh):
        run.state, metrics = run.step(run.state, run.frozen, batch)
    jax.block_until_ready((run.state, metrics))


def measure(stage: str, steps: int, rounds: int) -> dict[str, float]:
    """Processor seconds of a step, the median of the rounds, by side."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: start(stage, views, pathlib.Path(folder) / str(views)) for name, views in VIEWS.items()}
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                began = time.process_time()
                for _ in range(steps):
                    step(run)
                found[name].append((time.process_time() - began) / steps)
    return {name: float(np.median(values)) for name, values in found.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    rows = [["nano", *VIEWS, "ratio"]]
    for stage in ("stage1", "stage2"):
        seconds = measure(stage, given.steps, given.rounds)
        live, cached = seconds.values()
        rows.append([stage, f"{live:.2f} s", f"{cached:.2f} s", f"{live / cached:.1f}"])
    print(markdown(rows))
