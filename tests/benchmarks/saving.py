"""What it costs to save a checkpoint while training goes on, with nano's stage 1.

    python -m tests.benchmarks.saving [--pairs 6] [--steps 3]

Blocks of steps without a checkpoint, with one that is written beside them, and with one that they wait for take turns;
a block ends when its steps and its checkpoint are done. What a checkpoint costs is the median difference between
neighbours, as a share of the 100 steps from one to the next.
"""

from __future__ import annotations

import argparse
import pathlib
import runpy
import statistics
import tempfile
import time

import jax

from blip2_jax import trainer
from blip2_jax.parallel import mesh as meshes

EVERY = 100  # Steps between two checkpoints.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6, help="of blocks")
    parser.add_argument("--steps", type=int, default=3, help="in a block")
    options = parser.parse_args()
    path = pathlib.Path(__file__).parents[2] / "configs" / "stage1.py"
    config = runpy.run_path(str(path))["get_config"]()
    config.data.eval = ""
    with tempfile.TemporaryDirectory() as folder:
        run = trainer.Run(config, pathlib.Path(folder) / "w")

        def block(save: bool, wait: bool = False) -> tuple[float, float]:
            """Seconds on the clock and of the processors."""
            started = time.perf_counter(), time.process_time()
            if save:
                run.save({})
            if wait:
                run.settle()
            for _ in range(options.steps):
                with jax.set_mesh(run.mesh):
                    batch = meshes.global_batch(next(run.data).batch, config.batch_size, run.mesh)
                    run.state, metrics = run.step(run.state, run.frozen, batch)
                jax.block_until_ready(metrics)
            run.settle()
            return time.perf_counter() - started[0], time.process_time() - started[1]

        block(True)  # Compiles, and makes what the first save has to make.
        found = {"": [], "beside the steps": [], "before the steps": []}
        for number in range(options.pairs):
            found[""].append(block(False))
            found["beside the steps"].append(block(True))
            found["before the steps"].append(block(True, wait=True))
            print(
                f"round {number}: "
                + ", ".join(f"{name or 'none'} {times[-1][0]:.2f} s" for name, times in found.items())
            )
        run.store.close()
    for kind, clock in enumerate(("on the clock", "of the processors")):
        step = statistics.median(times[kind] for times in found[""]) / options.steps
        for name in ("beside the steps", "before the steps"):
            pairs = zip(found[name], found[""], strict=True)
            more = sorted(saving[kind] - other[kind] for saving, other in pairs)
            cost = statistics.median(more)
            print(
                f"saving {name}: {cost:.2f} s {clock} ({more[0]:.2f} ... {more[-1]:.2f}), "
                f"{cost / (EVERY * step):.2%} of {EVERY} steps of {step:.2f} s"
            )


if __name__ == "__main__":
    main()
