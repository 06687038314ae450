"""Pictures like photos, for benchmarks of decoding: shapes of all sizes that hide one another, rough surfaces, grain.

Their spectrum falls as that of photos does, and as JPEGs of quality 90 with halved colours, 640 x 480, they take about
120 kB, as COCO's photos do.
"""

from __future__ import annotations

import concurrent.futures
import functools
import io
import os
import pathlib

import numpy as np
from PIL import Image

from blip2_jax.checkpoints.downloads import cache_directory

_VERSION = 1  # Of what is drawn.


def _rough(rng: np.random.Generator, height: int, width: int, exponent: float) -> np.ndarray:
    """float32[H, W] of variance 1, whose amplitude falls with the frequency to the power of `exponent`."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width) * width)
    frequency[0, 0] = np.inf
    surface = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / frequency**exponent, (height, width))
    return (surface / surface.std()).astype(np.float32)


def photo(seed: int, width: int = 640, height: int = 480, shapes: int = 300) -> np.ndarray:
    """uint8[H, W, 3]: another one for each seed."""
    rng = np.random.default_rng(seed)
    picture = np.empty((height, width, 3), np.float32)
    picture[:] = rng.uniform(40, 215, 3)
    contrast = np.ones((height, width), np.float32)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    # Sizes are distributed as those of things in photos: by the inverse cube of the radius.
    radii = 8 / np.sqrt(1 - rng.random(shapes) * (1 - (8 / 250) ** 2))
    for radius in sorted(radii, reverse=True):
        centre_x, centre_y, turn = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0, np.pi)
        rows = slice(max(int(centre_y - radius), 0), int(centre_y + radius) + 1)
        columns = slice(max(int(centre_x - radius), 0), int(centre_x + radius) + 1)
        right, down = x[rows, columns] - centre_x, y[rows, columns] - centre_y
        along = (right * np.cos(turn) + down * np.sin(turn)) / radius
        across = (down * np.cos(turn) - right * np.sin(turn)) / (radius * rng.uniform(0.5, 1))
        inside = np.clip((1 - np.hypot(along, across)) * radius + 0.5, 0, 1)
        colour = rng.uniform(20, 235) + rng.normal(0, 25, 3) + (along * rng.normal(0, 15))[..., None]
        picture[rows, columns] += inside[..., None] * (colour - picture[rows, columns])
        contrast[rows, columns] += inside * (rng.lognormal(0, 0.7) - contrast[rows, columns])
    picture += (contrast * _rough(rng, height, width, rng.uniform(0.9, 1.4)) * rng.uniform(8, 20))[..., None]
    picture += (6 * _rough(rng, height, width, 1.2))[..., None] * rng.normal(0, 1, 3)
    picture += rng.normal(0, rng.uniform(1, 4), (height, width, 1))
    return np.clip(picture, 0, 255).astype(np.uint8)


def jpeg(array: np.ndarray) -> bytes:
    """Quality 90, 4:2:0."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "JPEG", quality=90, subsampling="4:2:0")
    return stream.getvalue()


def _write(folder: pathlib.Path, seed: int) -> None:
    file = folder / f"{seed:05d}.jpg"
    if not file.exists():
        partial = file.with_suffix(".partial")
        partial.write_bytes(jpeg(photo(seed)))
        file.with_suffix(".txt").write_text(f"photo {seed}")
        partial.replace(file)


def folder_of_photos(count: int) -> pathlib.Path:
    """A folder of so many JPEGs, each beside a caption, in the cache or made now."""
    folder = cache_directory() / "benchmarks" / f"photos-{count}-v{_VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    if len(list(folder.glob("*.jpg"))) < count:
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(functools.partial(_write, folder), range(count), chunksize=16))
    return folder
