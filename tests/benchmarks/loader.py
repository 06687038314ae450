"""Our loader beside a torch DataLoader, on the same JPEGs: python -m tests.benchmarks.loader

2,000 JPEGs like photos, 640 x 480, about 120 kB each; random resized crops of at least half of the area, bicubic, to
224 px, mirrored at random; batches of 128; as many workers on each side. All loaders take turns in blocks of seconds,
so that what else the machine does meets them alike; medians, smallest and largest are over the blocks. "uint8" is
the same work on both sides. "float32" is what the original does on the host besides, and ours on the device.

"a core" counts images a second of processor time, over all processes and threads of a loader. It needs Linux.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from blip2_jax.data.features import View
from blip2_jax.data.pipeline import Part, Pictures, collate_images, training_batches
from blip2_jax.data.records import Record
from blip2_jax.data.sources import open_source
from tests.benchmarks.photos import folder_of_photos
from tests.benchmarks.tables import markdown

SIZE, MIN_SCALE, BATCH = 224, 0.5, 128
PAUSE = 2  # Seconds in which the loader before fills its buffers.
LEAST = 8  # Batches of a block, however long they take.
OURS_THREADS, OURS_PROCESSES = "blip2_jax, threads", "blip2_jax, processes"
TORCH, TORCH_FLOAT = "torch, uint8", "torch, float32"


def as_it_is(example: Record, rng: np.random.Generator) -> Record:
    """No text to prepare."""
    return example


def ours(folder: pathlib.Path, threads: int, workers: int) -> Iterator[Any]:
    """Batches of the pipeline that trains."""
    name = f"folder:{folder}"
    view = View(SIZE, min_scale=MIN_SCALE, flip=True, count=1)
    parts = [Part(Pictures(name, open_source(name), view), as_it_is)]
    return training_batches(parts, collate_images, BATCH, 0, threads=threads, workers=workers)


def processor_seconds() -> float:
    """Used so far by this process and all that descend from it and still live."""
    parents, seconds = {}, {}
    for file in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        process = int(file.parent.name)
        parents[process] = int(fields[1])
        seconds[process] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def is_ours(process: int) -> bool:
        return process == os.getpid() or (process in parents and is_ours(parents[process]))

    return sum(used for process, used in seconds.items() if is_ours(process))


@dataclasses.dataclass
class Rates:
    """Images a second, block by block.

    Attributes:
      wall: of time that passes.
      core: of processor time.
    """

    wall: list[float] = dataclasses.field(default_factory=list)
    core: list[float] = dataclasses.field(default_factory=list)

    def measure(self, batches: Iterator[Any], before: int, seconds: float) -> None:
        """One block, after the batches that may have been made before it."""
        time.sleep(PAUSE)
        for _ in range(before):
            next(batches)
        images, start, used = 0, time.perf_counter(), processor_seconds()
        while time.perf_counter() - start < seconds or images < LEAST * BATCH:
            next(batches)
            images += BATCH
        self.wall.append(images / (time.perf_counter() - start))
        self.core.append(images / (processor_seconds() - used))


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} ... {max(values):,.0f})"


def comparison(rates: Mapping[str, Rates]) -> str:
    """A row for each loader, and its ratios to torch's two: the median over blocks that followed one another."""
    against = [(kind, other) for other in (TORCH, TORCH_FLOAT) for kind in ("wall", "core")]
    ratios = (f"{'a core, ' if kind == 'core' else ''}to {other}" for kind, other in against)
    rows = [["loader", "images/s", "images/s a core", *ratios]]
    for name, found in rates.items():
        pairs = [zip(getattr(found, kind), getattr(rates[other], kind), strict=True) for kind, other in against]
        medians = (f"{statistics.median(own / its for own, its in pair):.2f}" for pair in pairs)
        rows.append([name, _median(found.wall), _median(found.core), *medians])
    return markdown(rows)


def projection(rates: Mapping[str, Rates], rate: float, chips: Sequence[int]) -> str:
    """The cores of a host that keep its chips fed."""
    rows = [[f"chips a host, {rate:g} images/s each", "images/s", *(f"cores, {name}" for name in rates)]]
    for count in chips:
        cores = (f"{count * rate / statistics.median(found.core):.1f}" for found in rates.values())
        rows.append([str(count), f"{count * rate:,.0f}", *cores])
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=5, help="of each block")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--rate", type=float, default=150, help="images a second that a chip trains on, by plan or run")
    parser.add_argument("--chips", type=int, nargs="+", default=[4, 8], help="of a host")
    options = parser.parse_args()
    from tests.benchmarks import torch_photos  # Only here: workers of ours need no torch.

    folder = folder_of_photos(options.photos)
    torch_batches = lambda floats: torch_photos.batches(folder, SIZE, MIN_SCALE, floats, BATCH, options.workers)
    count = options.workers
    loaders = {  # With the batches, a worker, that it makes ahead.
        OURS_THREADS: (ours(folder, threads=count, workers=0), 3),
        OURS_PROCESSES: (ours(folder, threads=1, workers=count), 8),
        TORCH: (torch_batches(False), 3),
        TORCH_FLOAT: (torch_batches(True), 3),
    }
    rates = {name: Rates() for name in loaders}
    for block in range(options.blocks):
        for name, (batches, ahead) in loaders.items():
            rates[name].measure(batches, ahead * count, options.seconds)
            print(f"block {block + 1}, {name}: {rates[name].wall[-1]:,.0f} images/s", flush=True)
    print(f"\n{count} workers, {os.cpu_count()} cores\n\n{comparison(rates)}\n")
    print(projection(rates, options.rate, options.chips))


if __name__ == "__main__":
    main()
