"""From sources to batches, on Grain: shuffled, mixed, repeated, augmented, tokenized, and resumable to the exact batch.

Every random choice belongs to a position in the stream, not to a moment: which batch comes next is known from how many
there were, whatever the number of threads, workers and hosts. A record that cannot be used leaves its position to
another one of its source, so batches are always full.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags

from blip2_jax.data.features import FeatureTable, View
from blip2_jax.data.filters import EVERYTHING, Filters
from blip2_jax.data.records import BadRecord, Record, Source
from blip2_jax.data.sources import identify

Batch = dict[str, Any]  # Arrays by field: of numpy on the host, of jax in a step.
Schema = dict[str, jax.ShapeDtypeStruct]

_ATTEMPTS = 100  # Records in a row of which none can be used, before the source is said to be useless.


@dataclasses.dataclass(frozen=True)
class Pictures:
    """A source with the way its pictures reach a batch: as pixels, or as image tokens computed before.

    Attributes:
      name: the string that names the source.
      source: its records.
      view: how pixels are rendered.
      features: the table of image tokens, or None.
      filters: which captions are used; those of pictures are the view's.
    """

    name: str
    source: Source
    view: View
    features: FeatureTable | None = None
    filters: Filters = EVERYTHING

    def image(self, record: Record, index: int, rng: np.random.Generator | None) -> Batch:
        """The field `image` uint8[S, S, 3], or `image_embeds` float16[P, D]; without `rng`, of view 0."""
        if self.features is not None:
            number = 0 if rng is None else int(rng.integers(self.features.views))
            return {"image_embeds": self.features[number, index]}
        number = 0 if rng is None else int(rng.integers(2**31))
        return {"image": self.view.render(record, index, number)}

    def example(self, index: int, rng: np.random.Generator | None = None) -> Record:
        """A record with its picture and the identities that batches carry; a caption is chosen if there are several.

        Without `rng`, in evaluation, that is the first, and all `captions` are there, too.
        Records with a question have no caption.
        """
        record = self.source[index]
        example = {name: value for name, value in record.items() if name not in ("image", "captions")}
        if "question" not in record:
            captions = self.filters.captions(record)
            example["caption"] = captions[0] if rng is None else captions[int(rng.integers(len(captions)))]
            example |= {"captions": list(captions)} if rng is None else {}
        return example | self.image(record, index, rng) | {"image_id": identify(self.name, record["key"])}


def collate_images(examples: Sequence[Record]) -> Batch:
    """The fields that every batch has, [B, ...] each, with an `example_mask` bool[B] that is all True."""
    fields = [name for name in ("image", "image_embeds") if name in examples[0]]
    batch = {name: np.stack([example[name] for example in examples]) for name in (*fields, "image_id")}
    return batch | {"example_mask": np.ones(len(examples), bool)}


class _Indices:
    """Positions instead of records: the random choice of a view comes before the record is read."""

    def __init__(self, length: int):
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:
        return int(index)


class _Rows:
    """Of a stream of examples, those that belong to some rows of its batches: row r of batch i is number i * B + r."""

    def __init__(self, stream: grain.MapDataset, batch_size: int, rows: Sequence[int], start: int):
        self._stream, self._batch_size, self._rows = stream, batch_size, [int(row) for row in rows]
        self._start = start

    def __len__(self) -> int:
        return (len(self._stream) // self._batch_size - self._start) * len(self._rows)

    def __getitem__(self, index: int) -> Any:
        batch, number = divmod(int(index), len(self._rows))
        return self._stream[(self._start + batch) * self._batch_size + self._rows[number]]


@dataclasses.dataclass(frozen=True)
class Part:
    """Where some of the rows of every training batch come from.

    Attributes:
      pictures: reshuffled every epoch.
      prepare: from an example and a random generator to what the task collates; can be pickled.
      share: of the rows.
    """

    pictures: Pictures
    prepare: Callable[[Record, np.random.Generator], Any]
    share: float = 1.0


class Delivery(NamedTuple):
    """What a batch is made of.

    Attributes:
      batch: arrays by field.
      rejects: what could not be used on the way: {"source", "key", "reason", "detail"} each.
    """

    batch: Batch
    rejects: list[dict[str, str]]


@dataclasses.dataclass(frozen=True)
class _Load:
    """From a record's number to a prepared example, and what was rejected before there was one."""

    part: Part

    def __call__(self, index: int, rng: np.random.Generator) -> tuple[Any, list[dict[str, str]]]:
        pictures, rejects = self.part.pictures, []
        while len(rejects) < _ATTEMPTS:
            try:
                return self.part.prepare(pictures.example(index, rng), rng), rejects
            except BadRecord as bad:
                rejects.append({"source": pictures.name, "key": bad.where, "reason": bad.reason, "detail": bad.detail})
                index = int(rng.integers(len(pictures.source)))
        raise ValueError(f"{pictures.name}: {_ATTEMPTS} records in a row cannot be used, the last one: {rejects[-1]}")


@dataclasses.dataclass(frozen=True)
class _Collate:
    """A batch of loaded examples."""

    collate: Callable[[Sequence[Any]], Batch]

    def __call__(self, loaded: Sequence[tuple[Any, list[dict[str, str]]]]) -> Delivery:
        examples, rejects = zip(*loaded, strict=True)
        return Delivery(self.collate(examples), [reject for several in rejects for reject in several])


def training_batches(
    parts: Sequence[Part],
    collate: Callable[[Sequence[Any]], Batch],
    batch_size: int,
    seed: int,
    *,
    rows: Sequence[int] | None = None,
    start: int = 0,
    threads: int = 2,
    workers: int = 0,
) -> Iterator[Delivery]:
    """An endless sequence of batches.

    Args:
      parts: what to mix, row by row.
      collate: a list of prepared examples to a batch; can be pickled.
      batch_size: B.
      seed: of all random choices.
      rows: which rows of each batch to make, so that processes share the work; the batch is the same however many
        there are. None: all.
      start: the batches that were taken before and are left out.
      threads: that make batches ahead, in each process.
      workers: processes that do so; 0: this one.
    """
    rows = range(batch_size) if rows is None else rows

    def examples(part: Part, seed: int) -> grain.MapDataset:
        indices = _Indices(len(part.pictures.source))
        return grain.MapDataset.source(indices).seed(seed).shuffle().repeat().random_map(_Load(part))

    datasets = [examples(part, _seed(seed, number)) for number, part in enumerate(parts)]
    mixed = datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, [part.share for part in parts])
    own = grain.MapDataset.source(_Rows(mixed, batch_size, rows, start))
    batches = own.batch(len(rows), drop_remainder=True, batch_fn=_Collate(collate))
    ahead = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain asks flags of its own, also where no command line was read.
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        ahead = ahead.mp_prefetch(options, worker_init_fn=_serve)
    return iter(ahead)


def _serve(_index: int, _count: int) -> None:
    """Of a worker: leave the devices to the process that trains, and end with it, however it ends."""
    jax.config.update("jax_platforms", "cpu")

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def order_identity(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """What the order of records follows from besides the recipe."""
    facts = lambda name, source, share: {
        "source": name,
        "records": len(source),
        "identity": source.identity,
        "share": share,
    }
    return [facts(part.pictures.name, part.pictures.source, part.share) for part in parts]


def check_order(known: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError if a run that began with other sources, by `order_identity`, cannot get its exact next batch."""
    changed = [
        f"  {now['source']}: {then['records']:,} records then, {now['records']:,} now"
        for then, now in zip(known, found, strict=True)
        if then != now
    ]
    if changed:
        raise ValueError(
            "the run cannot go on with its exact next batch, since the data are not those it began with:\n"
            + "\n".join(changed)
            + "\nBring them back, or start in a new --workdir from this one's weights with --config.init."
        )


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def evaluation_batches(
    pictures: Pictures,
    collate: Callable[[Sequence[Record]], Batch],
    batch_size: int,
    rows: Sequence[int] | None = None,
) -> Iterator[tuple[list[Record | BadRecord | None], Batch]]:
    """Every record once, in order, with plain views: row r of batch i is record i * B + r.

    Args:
      pictures: what to read.
      collate: a list of examples to a batch.
      batch_size: B.
      rows: which rows of each batch to make, so that processes share the work; None: all.

    Yields:
      What became of the records of these rows: examples, why one cannot be used, or None behind the last one. And the
      batch of these rows; where there is no example stands a copy of the source's first, and `example_mask` is False.

    Raises:
      ValueError: not one record can be used.
    """
    rows, total = range(batch_size) if rows is None else rows, len(pictures.source)

    def read(index: int) -> Record | BadRecord | None:
        try:
            return pictures.example(index) if index < total else None
        except BadRecord as bad:
            return bad

    @functools.cache
    def filler() -> Record:
        usable = (found for found in map(read, range(total)) if isinstance(found, dict))
        if (first := next(usable, None)) is None:
            raise ValueError(f"{pictures.name}: none of its {total:,} records can be used, the first one: {read(0)}")
        return first

    for start in range(0, total, batch_size):
        found = [read(start + int(row)) for row in rows]
        usable = np.asarray([isinstance(one, dict) for one in found])
        batch = collate([one if there else filler() for one, there in zip(found, usable, strict=True)])
        yield found, batch | {"example_mask": usable}


def check_batch(batch: Mapping[str, np.ndarray], schema: Schema) -> None:
    """Raise ValueError if a batch is not exactly what the task's schema says."""
    problems = [f"{name}: missing" for name in schema if name not in batch]
    problems += [f"{name}: not in the schema" for name in batch if name not in schema]
    for name in schema.keys() & batch.keys():
        expected, found = schema[name], batch[name]
        if expected.shape != found.shape or expected.dtype != found.dtype:
            problems.append(
                f"{name}: expected {expected.dtype}{list(expected.shape)}, found {found.dtype}{list(found.shape)}"
            )
    if problems:
        raise ValueError("the data pipeline does not fulfil the task's schema: " + "; ".join(sorted(problems)))
