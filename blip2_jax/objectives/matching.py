"""Image-text matching, ITM (paper section 3.2): is this the caption of this image? Negatives are the hard ones."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from blip2_jax import compat
from blip2_jax.objectives import candidates
from blip2_jax.parallel.rows import Rows, rows_of


class HardNegatives(NamedTuple):
    """Attributes:
    image: int32[B], for each caption the global row of an image that is not its own.
    text: int32[B], for each image the global row of a caption that is not its own.
    valid: bool[B], whether the row has any such partner (the relation is symmetric: one mask serves both). Where it
      has none, `image` and `text` are rows all the same, of anything.
    image_margin, text_margin: float32[B], by how much each was drawn before the next best; inf without a next best.
      A margin near the rounding error of a logit is a draw that another mesh may decide otherwise. None where
      negatives were not drawn but recorded.
    """

    image: jax.Array
    text: jax.Array
    valid: jax.Array
    image_margin: jax.Array | None = None
    text_margin: jax.Array | None = None


def hard_negatives(
    key: jax.Array,
    image_features: jax.Array,
    text_features: jax.Array,
    temperature: jax.Array,
    pairs: candidates.Pairs,
    *,
    sampling: str = "hard",
    block: int = 512,
) -> HardNegatives:
    """Draw a wrong image for each caption and a wrong caption for each image, the likelier the more similar.

    Candidates are the real rows of the global batch that are not the same as the row. With "hard" the probability of a
    candidate is the softmax of cosine / temperature over the candidates (the original's code since July 2023); with
    "before_2023_07" it is proportional to the softmax over all real rows, the same ones too, plus 1e-4. Draws are by
    Gumbel noise that is a function of the key, the direction, and the two global rows: neither the mesh nor the size of
    a block changes them. Nothing has a gradient.

    Args:
      key: for this step; each direction folds in its own number.
      image_features: float[B, Q, E], unit length.
      text_features: float[B, E], unit length.
      temperature: float32[].
      pairs: of the same B rows.
      sampling: one of `compat.NEGATIVES`.
      block: number of captions compared at a time.

    Raises:
      ValueError: `sampling` or `pairs.by` is unknown, or `block` is below 1.
    """
    if sampling not in compat.NEGATIVES:
        raise ValueError(f"negatives drawn by {sampling!r}: expected one of {', '.join(compat.NEGATIVES)}")
    rows = rows_of(len(text_features))
    arrays = (x.astype(jnp.float32) for x in (image_features, text_features, jnp.asarray(temperature)))
    split, whole = rows.spec, PartitionSpec()
    device = functools.partial(_device_negatives, rows, sampling, block)
    arguments = jax.lax.stop_gradient((key, *arrays, pairs))
    return rows.map(device, (whole, split, split, whole, split), split)(*arguments)


class _Best(NamedTuple):
    """Of n lines of the table: the best score, the row that has it, and the score of the next best."""

    score: jax.Array
    row: jax.Array
    second: jax.Array

    def margin(self) -> jax.Array:
        return jnp.where(self.second > -jnp.inf, self.score - self.second, jnp.inf)


def _best(scores: jax.Array, rows: jax.Array, axis: int) -> _Best:
    """Of one block, [b, C], over the axis whose rows are given; the first of equals."""
    at = scores.argmax(axis)
    hit = jax.lax.broadcasted_iota(at.dtype, scores.shape, axis) == jnp.expand_dims(at, axis)
    return _Best(scores.max(axis), rows[at], jnp.where(hit, -jnp.inf, scores).max(axis))


def _better(a: _Best, b: _Best) -> _Best:
    """Of the same lines, over the candidates of both; `a` of equals."""
    later = b.score > a.score
    second = jnp.maximum(jnp.minimum(a.score, b.score), jnp.maximum(a.second, b.second))
    return _Best(jnp.where(later, b.score, a.score), jnp.where(later, b.row, a.row), second)


def _everyones_best(rows: Rows, best: _Best) -> _Best:
    """Best of B columns among this device's images -> best among all images; the smallest row of equals."""
    batch = len(best.row)
    score = rows.max(best.score)
    row = rows.min(jnp.where(best.score == score, best.row, batch))
    second = rows.max(jnp.where(row == best.row, best.second, best.score))
    return _Best(score, jnp.minimum(row, batch - 1), second)  # Features that are NaN have no best: still a row.


def _gumbel(key: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
    """Noise of one cell. 32 bits become the probability of an exponential variate, finest where the noise is large."""
    bits = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, row), column))[0]
    probability = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -jnp.log(-jnp.log1p(-probability))


def _device_negatives(rows, sampling, block, key, image_features, text_features, temperature, pairs):
    """What a device draws for its own images and, with the others, for its own captions."""
    table = candidates.table(rows, text_features, pairs, block)
    own, batch = len(text_features), len(text_features) * rows.shards
    image_key, text_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    image_noise = jax.vmap(jax.vmap(_gumbel, (None, 0, None)), (None, None, 0))
    text_noise = jax.vmap(jax.vmap(_gumbel, (None, None, 0)), (None, 0, None))
    image_total, text_total = jnp.zeros(own), jnp.zeros(table.blocks.row.shape)
    if sampling == "before_2023_07":
        images, texts = candidates.line_sums(rows, table, image_features, temperature)
        image_total = images.log_total()
        text_total = candidates.in_blocks(rows.gather(texts.log_total()), text_total.shape[1])

    def step(drawn, xs):
        best, valid = drawn
        side, texts, text_total = xs
        logits = candidates.similarities(image_features, texts) / temperature
        allowed = table.real(side) & ~table.same(side)

        def score(total: jax.Array, noise: jax.Array) -> jax.Array:
            weight = logits if sampling == "hard" else jnp.log(jnp.exp(logits - total) + 1e-4)
            return jnp.where(allowed, weight + noise, -jnp.inf)

        for_images = score(image_total[:, None], text_noise(text_key, table.own.row, side.row))
        for_texts = score(text_total[None], image_noise(image_key, side.row, table.own.row))
        best = _better(best, _best(for_images, side.row, 1))
        return (best, valid | allowed.any(1)), _best(for_texts, table.own.row, 0)

    nothing = _Best(jnp.full(own, -jnp.inf), jnp.zeros(own, jnp.int32), jnp.full(own, -jnp.inf))
    start = (nothing, jnp.zeros(own, bool))
    (text, valid), image = jax.lax.scan(step, start, (table.blocks, table.texts, text_total))
    image = _everyones_best(rows, jax.tree.map(lambda x: candidates.from_blocks(x, batch), image))
    image = jax.tree.map(lambda x: candidates.own_part(rows, x), image)
    return HardNegatives(image.row, text.row, valid, image.margin(), text.margin())


class MatchingWeights(NamedTuple):
    """What each of N judged pairs counts for; each field sums to 1, or to 0 where nothing counts.

    Attributes:
      loss: float32[N], all alike.
      positive: float32[N], the true pairs alike.
      negative: float32[N], the false pairs alike.
    """

    loss: jax.Array
    positive: jax.Array
    negative: jax.Array


def matching_weights(labels: jax.Array, counted: jax.Array) -> MatchingWeights:
    """Weights that make `matching_loss` a mean; they are for the whole batch, to be cut with it if it goes in pieces.

    Args:
      labels: int[N], 1 for a true pair.
      counted: bool[N], whether the pair is to count.
    """
    even = lambda which: which / jnp.maximum(which.sum(), 1.0)
    counted = counted.astype(jnp.float32)
    return MatchingWeights(even(counted), even(counted * labels), even(counted * (1 - labels)))


class MatchingLoss(NamedTuple):
    """Attributes:
    loss: float32[], nats. 0.6365 is the constant answer "one in three": a run that stays there learns nothing.
    positive_accuracy, negative_accuracy: float32[], shares of the true and of the false pairs judged rightly.
    """

    loss: jax.Array
    positive_accuracy: jax.Array
    negative_accuracy: jax.Array


def matching_loss(logits: jax.Array, labels: jax.Array, weights: MatchingWeights) -> MatchingLoss:
    """Cross-entropy over {no match, match}; weighted sums, so what the pieces of a batch give adds up.

    Args:
      logits: float[N, 2], already averaged over the queries.
      labels: int[N], 1 for a true pair.
      weights: of these pairs.
    """
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    loss = -jnp.take_along_axis(log_probability, labels[:, None], axis=-1)[:, 0]
    right = (logits.argmax(-1) == labels).astype(jnp.float32)
    return MatchingLoss((loss * weights.loss).sum(), (right * weights.positive).sum(), (right * weights.negative).sum())
