"""What a corpus is to be made of, and one shard of it.

A shard is a function of the plan and its number alone. So shards can be written in any order, by any process on any
machine, and those that are there already need not be written again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgpack
import numpy as np
from PIL import Image

from blip2_jax import files
from blip2_jax.data import shards
from blip2_jax.data.filters import Filters
from blip2_jax.data.images import LENIENT, Picture
from blip2_jax.data.records import BadRecord, Record, Source
from blip2_jax.data.sources import open_source
from blip2_jax.data.statistics import Statistics

_SAMPLED = 64  # Records by which the size of a corpus is estimated.
_JPEG_QUALITY = 92


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is done to every record.

    Attributes:
      check: decode each image, and leave out what cannot be decoded; otherwise only headers are read.
      filters: which images and captions are kept; None: all that can be used.
      resize: pixels that the shorter side of an image has at most, larger ones are made smaller; 0: no limit.
      shuffle: seed of a random order of the records; None: the order of the source.
    """

    check: bool = True
    filters: Filters | None = None
    resize: int = 0
    shuffle: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that the bytes of a corpus follow from.

    Attributes:
      source: the string that names it.
      identity: of its records and their order.
      length: how many they are.
      shards: how many files they are spread over.
      settings: what is done to them.
    """

    source: str
    identity: str
    length: int
    shards: int
    settings: Settings


def make_plan(source: str, settings: Settings, count: int | None, megabytes: float) -> tuple[Plan, float]:
    """A plan, and about how many bytes its corpus will take, by some records from all over the source.

    Args:
      source: the string that names it.
      settings: what is to be done to its records.
      count: of shards; None: as many as `megabytes` asks for.
      megabytes: that a shard should have.

    Raises:
      OSError, ValueError: the source cannot be opened, or holds too little.
    """
    opened = open_source(source)
    length = len(opened)
    if not length:
        raise ValueError(f"{source} holds no record")
    sampled, size = min(_SAMPLED, length), 0.0
    for number in range(sampled):
        with contextlib.suppress(BadRecord):
            record = process(opened[length * number // sampled], settings, Statistics())
            size += len(msgpack.packb(record)) * length / sampled
    if count is None:
        count = min(max(1, math.ceil(size / 1e6 / megabytes)), length)
    if not 1 <= count <= length:
        raise ValueError(f"{source} has {length:,} records: expected from 1 to as many shards, found {count:,}")
    return Plan(source, opened.identity, length, count, settings), size


def _smaller(pixels: np.ndarray, side: int) -> bytes:
    """A JPEG of uint8[H, W, 3] with `side` pixels along its shorter side."""
    image, encoded = Image.fromarray(pixels), io.BytesIO()
    scale = side / min(image.size)
    size = [max(side, round(scale * length)) for length in image.size]
    image.resize(size, Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=_JPEG_QUALITY)
    return encoded.getvalue()


def process(record: Record, settings: Settings, statistics: Statistics) -> Record:
    """A record as it is stored, counted in `statistics`.

    Raises:
      BadRecord: its image or its captions cannot be used, or do not pass the filters.
    """
    limits = LENIENT if settings.filters is None else settings.filters.limits
    if settings.filters and ("question" not in record or record.get("captions")):
        record = record | {"captions": settings.filters.captions(record)}
    picture = Picture(record["image"], record["key"], limits)
    if settings.check:
        picture.load()
    if settings.resize and min(picture.width, picture.height) > settings.resize:
        record = record | {"image": _smaller(picture.load(), settings.resize)}
        picture = Picture(record["image"], record["key"])
        statistics.resized += 1
    with Image.open(io.BytesIO(record["image"])) as image:
        statistics.add(record, (picture.width, picture.height), image.format)
    return record


@functools.lru_cache(maxsize=1)
def _open(plan: Plan) -> tuple[Source, Sequence[int]]:
    """The source of a plan and the order of its records, once a process.

    Raises:
      ValueError: the source is not what it was when the plan was made.
    """
    source = open_source(plan.source)
    if source.identity != plan.identity:
        raise ValueError(f"{plan.source} has changed since the corpus was begun: write a new one to another folder")
    if plan.settings.shuffle is None:
        return source, range(plan.length)
    import grain  # Takes seconds and brings jax with it.

    return source, grain.MapDataset.range(plan.length).shuffle(seed=plan.settings.shuffle)


class Facts(NamedTuple):
    """What is known of a shard: counts over its records, and the records that were left out of it."""

    statistics: Statistics
    rejects: list[dict[str, str]]


def facts_file(plan: Plan, folder: pathlib.Path, number: int) -> pathlib.Path:
    """Where it stands; it is written after the shard, so where it is the shard is whole."""
    return shards.shard_file(folder, number, plan.shards).with_suffix(".json")


def read_facts(plan: Plan, folder: pathlib.Path, number: int) -> Facts | None:
    """What is known of a shard, or None unless it is whole."""
    file, described = shards.shard_file(folder, number, plan.shards), facts_file(plan, folder, number)
    if not (file.exists() and described.exists()):
        return None
    content = json.loads(described.read_text(encoding="utf-8"))
    facts = Facts(Statistics.from_json(content["statistics"]), content["rejects"])
    return facts if facts.statistics.file_bytes == file.stat().st_size else None


def write_shard(plan: Plan, folder: pathlib.Path, number: int, tell: Callable[[int], None]) -> None:
    """Write one shard of a corpus, and beside it what is known of it, each whole or not at all.

    Args:
      plan: of the corpus.
      folder: of the corpus.
      number: of the shard.
      tell: is called with 1 for every record that was read; what it raises stops the work.
    """
    source, order = _open(plan)
    facts = Facts(Statistics(), [])

    def encoded() -> Iterator[bytes]:
        for position in shards.shard_range(plan.length, number, plan.shards):
            try:
                record = process(source[int(order[position])], plan.settings, facts.statistics)
            except BadRecord as bad:
                facts.statistics.rejected[bad.reason] += 1
                facts.rejects.append({"key": bad.where, "reason": bad.reason, "detail": bad.detail})
            else:
                yield msgpack.packb(record)
            tell(1)

    file = shards.shard_file(folder, number, plan.shards)
    shards.write_shard(file, encoded())
    facts.statistics.file_bytes = file.stat().st_size
    content = {"statistics": facts.statistics.to_json(), "rejects": facts.rejects}
    files.write_json(facts_file(plan, folder, number), content)
