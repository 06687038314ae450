"""Image tokens computed once: while the encoder is frozen, the same view of a picture gives the same tokens.

Where the encoder costs more than everything after it, a run trains on the tokens of a fixed number of random views of
each picture, in random order. They lie in a folder named by the hash of all that they depend on, the encoder's weights
among it:

    FOLDER/features.json                   what they depend on
    FOLDER/00000-of-00004.arrayrecord      the tokens of view v of record n are number v * N + n
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import ml_dtypes
import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from blip2_jax import files
from blip2_jax.data import images
from blip2_jax.data.records import BadRecord, Source
from blip2_jax.data.shards import shard_file, shard_range, write_shard
from blip2_jax.monitoring.progress import progress

# How tokens are stored; float8 (e4m3) has a scale for each picture, and is bfloat16 again when it is read.
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8": np.dtype(ml_dtypes.float8_e4m3fn),
}
_LARGEST_FLOAT8 = 448.0
_SHARD_BYTES = 2**28
_HEADROOM = 2**27  # Bytes to leave on the disk.


class View(NamedTuple):
    """How pictures are looked at.

    Attributes:
      image_size: S, pixels.
      min_scale: smallest share of the area that a random crop keeps.
      flip: mirror at random.
      count: K, random views of each picture; 0 is the one plain view that evaluation uses.
      seed: of the crops.
      limits: which pictures are used.
    """

    image_size: int
    min_scale: float = 1.0
    flip: bool = False
    count: int = 0
    seed: int = 0
    limits: images.Limits = images.LENIENT

    def render(self, record: dict, index: int, number: int) -> np.ndarray:
        """View `number` of the record with this index: uint8[S, S, 3]."""
        if self.count == 0:
            return images.resize(images.decode(record["image"], record["key"], self.limits), self.image_size)
        picture = images.Picture(record["image"], record["key"], self.limits)
        rng = np.random.default_rng([self.seed, number, index])
        return images.random_resized_crop(picture, self.image_size, rng, self.min_scale, self.flip)


@dataclasses.dataclass(frozen=True)
class FeaturePlan:
    """What the tokens of a source depend on.

    Attributes:
      source: identity of the source.
      records: N.
      encoder: SHA-256 of the encoder's weights.
      view: how pictures are looked at.
      dtype: one of DTYPES.
      shape: (P, D).
    """

    source: str
    records: int
    encoder: str
    view: View
    dtype: str
    shape: tuple[int, int]

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"data.feature_dtype = {self.dtype!r}: expected one of {', '.join(DTYPES)}")

    @property
    def facts(self) -> dict:
        """As in features.json."""
        return json.loads(json.dumps(dataclasses.asdict(self) | {"view": self.view._asdict()}))

    @property
    def views(self) -> int:
        """K, at least the plain one."""
        return max(self.view.count, 1)

    @property
    def record_bytes(self) -> int:
        """Of the tokens of one picture."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize + 4 * (self.dtype == "float8")

    def folder(self, root: pathlib.Path) -> pathlib.Path:
        """Where they lie under `root`."""
        return root / hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:32]

    def shards(self, root: pathlib.Path) -> list[pathlib.Path]:
        """Their files."""
        count = math.ceil(self.views * self.records * self.record_bytes / _SHARD_BYTES)
        return [shard_file(self.folder(root), number, count) for number in range(count)]

    def pack(self, tokens: np.ndarray) -> bytes:
        """float[P, D] as it is stored."""
        if self.dtype != "float8":
            return tokens.astype(DTYPES[self.dtype]).tobytes()
        scale = np.float32(max(np.abs(tokens).max(), np.finfo(np.float32).tiny) / _LARGEST_FLOAT8)
        return scale.tobytes() + (tokens / scale).astype(DTYPES["float8"]).tobytes()

    def unpack(self, stored: bytes) -> np.ndarray:
        """The opposite of `pack`."""
        if self.dtype != "float8":
            return np.frombuffer(stored, DTYPES[self.dtype]).reshape(self.shape)
        scale, tokens = np.frombuffer(stored[:4], np.float32)[0], np.frombuffer(stored[4:], DTYPES["float8"])
        return (tokens.astype(np.float32) * scale).astype(batch_dtype("float8")).reshape(self.shape)


def batch_dtype(stored: str) -> np.dtype:
    """Of tokens in a batch, by how they are stored."""
    return DTYPES["bfloat16" if stored == "float8" else stored]


class FeatureTable:
    """The tokens of all views and records, by index."""

    def __init__(self, plan: FeaturePlan, root: pathlib.Path):
        """Open what is under `root`.

        Raises:
          FileNotFoundError: it is not there, or not all of it; or what is there was made of something else.
        """
        shards = plan.shards(root)
        missing = [file for file in shards if not file.exists()]
        if missing:
            raise FileNotFoundError(_what_is_there_instead(plan, root, missing))
        self.plan, self._reader = plan, ArrayRecordDataSource([str(file) for file in shards])

    @property
    def views(self) -> int:
        """K."""
        return self.plan.views

    def __getitem__(self, key: tuple[int, int]) -> np.ndarray:
        """float[P, D] of (view, record); raises BadRecord where the picture could not be used."""
        view, index = key
        stored = self._reader[view * self.plan.records + index]
        if len(stored) != self.plan.record_bytes:
            raise BadRecord(*msgpack.unpackb(stored))
        return self.plan.unpack(stored)


def _what_is_there_instead(plan: FeaturePlan, root: pathlib.Path, missing: Sequence[pathlib.Path]) -> str:
    folder = plan.folder(root)
    if folder.exists():
        return f"{folder} lacks {len(missing)} of its files, the first {missing[0].name}: run cache_features to the end"
    others = [json.loads(file.read_text()) for file in sorted(root.glob("*/features.json"))]
    near = [facts for facts in others if facts["source"] == plan.source]
    if not near:
        return f"{root} holds no image tokens of this source: run cache_features with the settings of this run"
    differences = [
        f"  {name}: {facts[name]!r} there, {wanted!r} in this run"
        for facts in near
        for name, wanted in plan.facts.items()
        if facts[name] != wanted
    ]
    return (
        f"{root} holds image tokens of this source, but of other ones than this run's:\n"
        + "\n".join(differences)
        + "\nRun cache_features with the settings of this run, or give the run theirs."
    )


def compute(
    source: Source,
    plan: FeaturePlan,
    encode: Callable[[np.ndarray], np.ndarray],
    root: pathlib.Path,
    label: str,
    *,
    batch_size: int = 64,
    threads: int = 2,
    own: slice = slice(None),
) -> None:
    """Compute what is not there yet.

    Args:
      source: records with pictures.
      plan: what to compute of them.
      encode: uint8[batch_size, S, S, 3] -> float[batch_size, P, D].
      root: see `FeaturePlan.folder`.
      label: for the progress bar.
      batch_size: pictures encoded at once.
      threads: that decode pictures ahead.
      own: which shards, where processes share them.

    Raises:
      OSError: there is no room; nothing half-written remains, and finished shards stay.
    """
    shards, total = plan.shards(root), plan.views * plan.records
    ranges = [shard_range(total, number, len(shards)) for number in range(len(shards))]
    todo = [(file, wanted) for file, wanted in zip(shards[own], ranges[own], strict=True) if not file.exists()]
    if not todo:
        return
    count = sum(len(wanted) for _, wanted in todo)
    mend = "make room, set BLIP2_JAX_CACHE to another disk, or lower data.feature_views"
    files.require_room(root, count * plan.record_bytes + _HEADROOM, "the image features", mend)
    files.write_json(plan.folder(root) / "features.json", plan.facts)
    with progress(total=count, desc=label, unit="image") as bar, concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for file, wanted in todo:
            write_shard(file, _encoded(source, plan, encode, wanted, batch_size, pool, bar))


def _encoded(source, plan: FeaturePlan, encode, wanted: range, batch_size: int, pool, bar) -> Iterator[bytes]:
    """The stored form of some numbers of view and record; pictures are decoded while others are encoded."""

    def render(number: int) -> np.ndarray | BadRecord:
        view, index = divmod(number, plan.records)
        try:
            return plan.view.render(source[index], index, view)
        except BadRecord as bad:
            return bad

    blank = np.zeros((plan.view.image_size, plan.view.image_size, 3), np.uint8)
    ahead: collections.deque[list[concurrent.futures.Future]] = collections.deque()
    for start in [*wanted[::batch_size], None, None]:
        if start is not None:
            ahead.append([pool.submit(render, number) for number in range(start, min(start + batch_size, wanted.stop))])
        if ahead and (start is None or len(ahead) > 2):
            found = [future.result() for future in ahead.popleft()]
            pictures = [blank if isinstance(picture, BadRecord) else picture for picture in found]
            pictures += [blank] * (batch_size - len(pictures))
            tokens = np.asarray(encode(np.stack(pictures))).astype(np.float32)
            for picture, own in zip(found, tokens, strict=False):
                yield msgpack.packb(picture.args) if isinstance(picture, BadRecord) else plan.pack(own)
            bar.update(len(found))
