"""Peak host memory of retrieval over many images and captions, and how long it takes.

    python -m tests.benchmarks.retrieval --images 5000 --texts 25000

Features are drawn batch by batch, as an image encoder would deliver them. An image and its
captions are alike.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import time

import numpy as np

from blip2_jax.evaluation import retrieval
from blip2_jax.evaluation.batches import Layout
from blip2_jax.evaluation.search import RowsOnDisk, search
from blip2_jax.parallel import mesh as meshes


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 5000), ("texts", 25000), ("queries", 32), ("width", 256), ("batch", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep", type=int, default=128, help="candidates of a query, for ITM")
    options = parser.parse_args()
    layout, start = Layout(meshes.one_device(), options.batch), time.perf_counter()
    centres = np.random.default_rng(0).normal(size=(options.images, options.width)).astype(np.float32)
    with contextlib.closing(RowsOnDisk()) as images:
        for number in range(0, options.images, options.batch):
            rng, rows = np.random.default_rng(number), np.arange(number, number + options.batch) % options.images
            noise = rng.standard_normal((options.batch, options.queries, options.width), np.float32)
            images.append(unit(centres[rows, None] + 3 * noise))
        owners = np.arange(options.texts) % options.images
        noise = np.random.default_rng(1).standard_normal((options.texts, options.width), np.float32)
        texts = unit(centres[owners] + 3 * noise)
        drawn = time.perf_counter()
        found = search(layout, images, np.arange(options.images), texts, options.keep)
    pairs = np.sort(owners.astype(np.int64) * options.texts + np.arange(options.texts))
    gallery = retrieval.Gallery(list(map(str, range(options.texts))), owners.tolist(), pairs, options.images)
    recalls = retrieval.both_directions(gallery, *found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{options.images:,} images x {options.queries} queries, {options.texts:,} captions, {options.width} wide")
    print(f"peak memory of the process {peak:.2f} GiB; drawing {drawn - start:.0f} s, the rest", end=" ")
    print(f"{time.perf_counter() - drawn:.0f} s")
    print({direction: {name: round(value, 4) for name, value in found.items()} for direction, found in recalls.items()})


if __name__ == "__main__":
    main()
