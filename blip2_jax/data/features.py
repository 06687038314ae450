"""Image tokens computed once: while the encoder is frozen, the same view of a picture gives the same tokens.

On a CPU the encoder costs more than everything after it, so a run computes each picture's tokens for a fixed number of
random views, and trains on them in random order. The table is a plain file in the cache, named by the hash of all that
it depends on, mapped into memory; the second stage and a resumed run find it there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from blip2_jax import files
from blip2_jax.data import images
from blip2_jax.data.records import Source
from blip2_jax.monitoring.progress import progress

_BATCH = 64
_HEADROOM = 2**27  # Bytes to leave on the disk.


class View(NamedTuple):
    """How pictures are looked at.

    Attributes:
      image_size: S, pixels.
      min_scale: smallest share of the area that a random crop keeps.
      flip: mirror at random.
      count: K, random views of each picture; 0 is the one plain view that evaluation uses.
      seed: of the crops.
    """

    image_size: int
    min_scale: float = 1.0
    flip: bool = False
    count: int = 0
    seed: int = 0

    def render(self, record: dict, index: int, number: int) -> np.ndarray:
        """View `number` of the record with this index: uint8[S, S, 3]."""
        image = images.decode(record["image"], record["key"])
        if self.count == 0:
            return images.resize(image, self.image_size)
        rng = np.random.default_rng([self.seed, number, index])
        return images.random_resized_crop(image, self.image_size, rng, self.min_scale, self.flip)


@dataclasses.dataclass(frozen=True)
class FeatureTable:
    """float16[K, N, P, D]: view, record, image token, channel (K is 1 for the plain view)."""

    array: np.ndarray

    @property
    def views(self) -> int:
        return self.array.shape[0]

    def __getitem__(self, key: tuple[int, int]) -> np.ndarray:
        """float16[P, D] of (view, record)."""
        return self.array[key]


def compute(
    source: Source,
    view: View,
    encode: Callable[[np.ndarray], np.ndarray],
    shape: tuple[int, int],
    encoder_identity: str,
    directory: pathlib.Path,
    label: str,
) -> FeatureTable:
    """The table of a source, from the cache or computed now.

    Args:
      source: records with pictures.
      view: how they are looked at.
      encode: uint8[64, S, S, 3] -> float[64, P, D].
      shape: (P, D).
      encoder_identity: hash of the encoder's weights.
      directory: of the cache.
      label: for the progress bar.

    Raises:
      OSError: there is no room for the table; nothing half-written remains.
    """
    depends_on = {"encoder": encoder_identity, "source": source.identity, **view._asdict()}
    name = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]
    file = directory / "features" / f"{name}.f16"
    full_shape = (max(view.count, 1), len(source), *shape)
    size = int(np.prod(full_shape)) * 2
    if not (file.exists() and file.stat().st_size == size):
        _write(file, size, source, view, encode, full_shape, label)
    return FeatureTable(np.memmap(file, np.float16, "r", shape=full_shape))


def _write(file, size, source, view, encode, shape, label) -> None:
    mend = "make room, set BLIP2_JAX_CACHE to another disk, or lower data.feature_views"
    files.require_room(file.parent, size + _HEADROOM, "the image features", mend)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    views, records = shape[:2]
    try:
        with partial.open("wb") as stream, progress(total=views * records, desc=label, unit="image") as bar:
            for number in range(views):
                for start in range(0, records, _BATCH):
                    indices = range(start, min(start + _BATCH, records))
                    pictures = np.stack([view.render(source[index], index, number) for index in indices])
                    padding = ((0, _BATCH - len(pictures)), (0, 0), (0, 0), (0, 0))
                    tokens = np.asarray(encode(np.pad(pictures, padding)))[: len(pictures)]
                    stream.write(tokens.astype(np.float16).tobytes())
                    bar.update(len(pictures))
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)
