"""Image-text matching, ITM (paper section 3.2): is this the caption of this image? Negatives are the hard ones."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class HardNegatives(NamedTuple):
    """Attributes:
    image: int32[B], for each caption the row of an image that is not its own.
    text: int32[B], for each image the row of a caption that is not its own.
    valid: bool[B], whether the row has any such partner (the relation is symmetric: one mask serves both).
    """

    image: jax.Array
    text: jax.Array
    valid: jax.Array


def _draw(key: jax.Array, logits: jax.Array) -> jax.Array:
    """One categorical draw a row, by Gumbel noise that depends on the key, the row and the column alone."""
    rows, columns = logits.shape
    noise = jax.vmap(lambda row: jax.random.gumbel(jax.random.fold_in(key, row), (columns,)))(jnp.arange(rows))
    return jnp.argmax(logits + noise, axis=-1)


def hard_negatives(
    key: jax.Array, similarity: jax.Array, temperature: jax.Array, same: jax.Array, example_mask: jax.Array
) -> HardNegatives:
    """Draw a wrong image for each caption and a wrong caption for each image, the likelier the more similar.

    The probability of a candidate is the softmax of similarity / temperature over the candidates that are not the same
    pair, so positives are masked before the softmax (the original's code since July 2023).

    Args:
      key: for this step; each direction folds in its own number.
      similarity: float32[B, B], images by captions, cosines.
      temperature: float32[].
      same: bool[B, B] of `contrastive.same_pairs`.
      example_mask: bool[B]; False rows are never drawn.
    """
    similarity, temperature = jax.lax.stop_gradient((similarity, temperature))
    allowed = ~same & example_mask[None, :]
    logits = lambda sim: jnp.where(allowed, sim / temperature, -jnp.inf)
    image = _draw(jax.random.fold_in(key, 0), logits(similarity.T))
    text = _draw(jax.random.fold_in(key, 1), logits(similarity))
    return HardNegatives(image, text, allowed.any(-1) & example_mask)


class MatchingLoss(NamedTuple):
    """Attributes:
    loss: float32[], nats. 0.6365 is the constant answer "one in three": a run that stays there learns nothing.
    positive_accuracy, negative_accuracy: float32[], shares of the true and of the false pairs judged rightly.
    """

    loss: jax.Array
    positive_accuracy: jax.Array
    negative_accuracy: jax.Array


def matching_loss(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> MatchingLoss:
    """Cross-entropy over {no match, match}.

    Args:
      logits: float[N, 2], already averaged over the queries.
      labels: int[N], 1 for a true pair.
      weights: float[N], 0 for a row that must not count.
    """
    log_probability = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    loss = -jnp.take_along_axis(log_probability, labels[:, None], axis=-1)[:, 0]
    right = (logits.argmax(-1) == labels).astype(jnp.float32)
    mean = lambda x, w: (x * w).sum() / jnp.maximum(w.sum(), 1.0)
    return MatchingLoss(mean(loss, weights), mean(right, weights * labels), mean(right, weights * (1 - labels)))
