"""Every image of the global batch against every caption, block by block: what ITC and the hard negatives share.

A device has its own b images with all their queries, and all B captions, one vector each; it goes through the captions
in blocks of C. So it holds b x Q x C cosines at a time and never B x B, whatever the batch. One sweep serves both
directions: the rows of a block are the images', its columns the captions', and of the columns only vectors of length B
cross devices.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from blip2_jax import compat
from blip2_jax.parallel.rows import Rows

_LOWEST = float(jnp.finfo(jnp.float32).min)  # In the place of -inf, whose differences are NaN.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Which image and which caption a row of the batch is, and which rows count as the same.

    Attributes:
      image_id: uint32[B, 2].
      text_id: uint32[B, 2].
      example_mask: bool[B]; a False row is neither anchor nor candidate, and the same as nothing but itself.
      by: what makes two rows the same, one of `compat.POSITIVES`: "image_or_text", "image", or "pair" (a row and
        itself). The same rows share ITC's target and are no negatives of ITM. Static.
    """

    image_id: jax.Array
    text_id: jax.Array
    example_mask: jax.Array
    by: str = dataclasses.field(default=compat.POSITIVES[0], metadata={"static": True})


def query_cosines(image_features: jax.Array, text_features: jax.Array) -> jax.Array:
    """float[b, Q, E] and float[C, E], of unit length -> float32[b, Q, C]."""
    return jnp.einsum(
        "bqe,ce->bqc",
        image_features,
        text_features,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def similarities(image_features: jax.Array, text_features: jax.Array) -> jax.Array:
    """Cosine of each caption with the query that fits it best, as a whole: for evaluation, not for large batches.

    Args:
      image_features: float[B, Q, E], unit length.
      text_features: float[N, E], unit length.

    Returns:
      float32[B, N]: row i is image i against all captions; transposed, a caption against all images.
    """
    return query_cosines(image_features, text_features).max(1)


class Side(NamedTuple):
    """What the relation knows of n rows of the batch.

    Attributes:
      row: int32[n], numbers in the global batch.
      image_id: uint32[n, 2].
      text_id: uint32[n, 2].
      real: bool[n].
    """

    row: jax.Array
    image_id: jax.Array
    text_id: jax.Array
    real: jax.Array


class Table(NamedTuple):
    """A device's own rows against all captions.

    Attributes:
      by: as in `Pairs`.
      own: the images', [b].
      blocks: the captions' in N blocks, [N, C]; what fills up the last one is not real.
      texts: float[N, C, E], their features.
    """

    by: str
    own: Side
    blocks: Side
    texts: jax.Array

    def same(self, block: Side) -> jax.Array:
        """Which of the own rows are the same as which of a block's: bool[b, C]; symmetric over the whole batch."""
        itself = self.own.row[:, None] == block.row[None]
        if self.by == "pair":
            return itself
        equal = lambda mine, theirs: (mine[:, None] == theirs[None]).all(-1)
        alike = equal(self.own.image_id, block.image_id)
        if self.by == "image_or_text":
            alike |= equal(self.own.text_id, block.text_id)
        return (alike & self.real(block)) | itself

    def real(self, block: Side) -> jax.Array:
        """Where both rows are real: bool[b, C]."""
        return self.own.real[:, None] & block.real[None]

    def count(self) -> jax.Array:
        """float32[], the real rows of the global batch, at least 1."""
        return jnp.maximum(self.blocks.real.sum().astype(jnp.float32), 1.0)


def in_blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, ...] -> [N, size, ...], zeros where B ends."""
    x = jnp.pad(x, ((0, -len(x) % size),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(-1, size, *x.shape[1:])


def from_blocks(x: jax.Array, batch: int) -> jax.Array:
    """[N, C, ...] -> [B, ...]."""
    return x.reshape(-1, *x.shape[2:])[:batch]


def table(rows: Rows, text_features: jax.Array, pairs: Pairs, block: int) -> Table:
    """What a device, one of those that share the rows, compares; to be called by each with its own part.

    Raises:
      ValueError: `pairs.by` is unknown, or a block is empty.
    """
    if pairs.by not in compat.POSITIVES:
        raise ValueError(f"positives by {pairs.by!r}: expected one of {', '.join(compat.POSITIVES)}")
    if block < 1:
        raise ValueError(f"a block of {block} candidates: expected at least 1")
    own_rows = len(text_features)
    size = min(block, own_rows * rows.shards)
    everyones = lambda x: in_blocks(rows.gather(x), size)
    ids = (pairs.image_id, pairs.text_id, pairs.example_mask)
    own = Side(rows.index() * own_rows + jnp.arange(own_rows, dtype=jnp.int32), *ids)
    row = in_blocks(jnp.arange(own_rows * rows.shards, dtype=jnp.int32), size)
    return Table(pairs.by, own, Side(row, *map(everyones, ids)), everyones(text_features))


class Sums(NamedTuple):
    """Of n lines of the table, rows or columns, over their real candidates.

    Attributes:
      maximum: float32[n], the largest logit.
      exponentials: float32[n], sum of exp(logit - maximum).
      logits: float32[n], sum of the logits.
      same_logits: float32[n], sum of the logits of the same rows.
      same: float32[n], number of the same rows.
    """

    maximum: jax.Array
    exponentials: jax.Array
    logits: jax.Array
    same_logits: jax.Array
    same: jax.Array

    def log_total(self) -> jax.Array:
        """Log of the sum of exp(logit), float32[n]; finite, if meaningless, for a line without candidates."""
        return self.maximum + jnp.log(jnp.maximum(self.exponentials, jnp.finfo(jnp.float32).tiny))


def _sums(logits: jax.Array, same: jax.Array, real: jax.Array, axis: int) -> Sums:
    """Of one block, [b, C], over one of its axes."""
    maximum = jnp.where(real, logits, _LOWEST).max(axis)
    total = lambda x, where: jnp.where(where, x, 0.0).sum(axis)
    exponentials = total(jnp.exp(logits - jnp.expand_dims(maximum, axis)), real)
    return Sums(
        maximum, exponentials, total(logits, real), total(logits, same & real), total(jnp.float32(1), same & real)
    )


def _merge(a: Sums, b: Sums) -> Sums:
    """Of the same lines, over the candidates of both."""
    maximum = jnp.maximum(a.maximum, b.maximum)
    scaled = lambda x: x._replace(maximum=maximum, exponentials=x.exponentials * jnp.exp(x.maximum - maximum))
    return Sums(maximum, *(x + y for x, y in zip(scaled(a)[1:], scaled(b)[1:], strict=True)))


def own_part(rows: Rows, x: jax.Array) -> jax.Array:
    """[B, ...], the same on every device -> this device's rows of it, [b, ...]."""
    size = len(x) // rows.shards
    return jax.lax.dynamic_slice_in_dim(x, rows.index() * size, size)


def _everyones(rows: Rows, sums: Sums) -> Sums:
    """Sums of B columns over this device's images -> sums over all images, of this device's captions."""
    maximum = rows.max(sums.maximum)
    sums = sums._replace(exponentials=sums.exponentials * jnp.exp(sums.maximum - maximum))
    return Sums(own_part(rows, maximum), *(rows.scatter_sum(x) for x in sums[1:]))


def line_sums(rows: Rows, table: Table, image_features: jax.Array, temperature: jax.Array) -> tuple[Sums, Sums]:
    """What the softmax over all candidates needs, in one sweep, for this device's images and for its captions.

    Args:
      rows: how the batch lies on the devices.
      table: of this device.
      image_features: float32[b, Q, E], its own.
      temperature: float32[].

    Returns:
      Sums [b] of the images over all captions, and of the captions over all images.
    """

    def step(images: Sums, xs: tuple[Side, jax.Array]) -> tuple[Sums, Sums]:
        block, texts = xs
        logits = similarities(image_features, texts) / temperature
        same, real = table.same(block), table.real(block)
        return _merge(images, _sums(logits, same, real, 1)), _sums(logits, same, real, 0)

    own = len(image_features)
    start = Sums(jnp.full(own, _LOWEST), *[jnp.zeros(own)] * 4)
    images, captions = jax.lax.scan(step, start, (table.blocks, table.texts))
    captions = jax.tree.map(lambda x: from_blocks(x, own * rows.shards), captions)
    return images, _everyones(rows, captions)
