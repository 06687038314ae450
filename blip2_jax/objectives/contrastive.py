"""Image-text contrastive learning, ITC (paper section 3.2): every image against every caption of the global batch.

The loss is that of the whole batch, and its gradient is exact on any mesh. No [B, B] table exists at any time: both go
through the candidates in blocks (`candidates`), and the backward pass computes the blocks again.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from blip2_jax.objectives import candidates
from blip2_jax.objectives.candidates import Pairs, similarities
from blip2_jax.parallel.rows import Rows, rows_of

__all__ = ["Pairs", "contrastive_loss", "similarities"]

_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is no array."""

    rows: Rows
    label_smoothing: float
    gather_gradient: bool
    block: int


class _Lines(NamedTuple):
    """What the backward pass needs of the forward pass, float32[B] each.

    Attributes:
      image_total, text_total: log of the sum of exp(logit) over all candidates of an image, of a caption.
      same: number of rows that are the same (the relation is symmetric: one number for both).
    """

    image_total: jax.Array
    text_total: jax.Array
    same: jax.Array


def contrastive_loss(
    image_features: jax.Array,
    text_features: jax.Array,
    temperature: jax.Array,
    pairs: Pairs,
    *,
    label_smoothing: float = 0.1,
    gather_gradient: bool = True,
    block: int = 512,
) -> jax.Array:
    """Mean of the image-to-text and the text-to-image cross-entropy.

    The logit of an image and a caption is the cosine of the caption with the query that fits it best, over the
    temperature. The target of a row is (1 - s) spread evenly over the same pairs plus s spread evenly over all real
    candidates; with no duplicates in the batch that is label smoothing exactly. Rows are those of the surrounding mesh.

    Args:
      image_features: float[B, Q, E], unit length.
      text_features: float[B, E], unit length.
      temperature: float32[], the divisor of the cosines.
      pairs: of the same B rows; those that are not real are neither anchors nor candidates.
      label_smoothing: s.
      gather_gradient: False gives the gradient of the original, where candidates carry none: image-to-text trains the
        image features alone, text-to-image the text features alone.
      block: number of candidates compared at a time; changes the memory, not the result.

    Returns:
      float32[], nats; 0 without any real row.

    Raises:
      ValueError: `pairs.by` is unknown, or `block` is below 1.
    """
    settings = _Settings(rows_of(len(text_features)), label_smoothing, gather_gradient, block)
    image_features, text_features = image_features.astype(jnp.float32), text_features.astype(jnp.float32)
    return _loss(settings, image_features, text_features, jnp.asarray(temperature, jnp.float32), pairs)


# The derivative is defined outside of the shard_map: inside, it would have to say how gradients of what every device
# has are summed over devices.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(settings, image_features, text_features, temperature, pairs):
    return _loss_forward(settings, image_features, text_features, temperature, pairs)[0]


def _loss_forward(settings, *arguments):
    split, whole = settings.rows.spec, PartitionSpec()
    device = functools.partial(_device_forward, settings)
    loss, lines = settings.rows.map(device, (split, split, whole, split), (whole, split))(*arguments)
    return loss, (*arguments, lines)


def _loss_backward(settings, residuals, cotangent):
    split, whole = settings.rows.spec, PartitionSpec()
    device = functools.partial(_device_backward, settings)
    in_specs = (split, split, whole, split, split, whole)
    gradients = settings.rows.map(device, in_specs, (split, split, whole))(*residuals, cotangent)
    return *gradients, None


_loss.defvjp(_loss_forward, _loss_backward)


def _device_forward(settings, image_features, text_features, temperature, pairs):
    """The loss of the whole batch, and `_Lines` of a device's own rows."""
    rows, s = settings.rows, settings.label_smoothing
    table = candidates.table(rows, text_features, pairs, settings.block)
    count = table.count()
    images, texts = candidates.line_sums(rows, table, image_features, temperature)

    def cross_entropies(sums: candidates.Sums) -> jax.Array:
        # Differences first: what a lone pair loses is then 0, and not what rounding leaves.
        total = sums.log_total()
        hit, even = total - sums.same_logits / jnp.maximum(sums.same, 1.0), total - sums.logits / count
        return jnp.where(pairs.example_mask, (1 - s) * hit + s * even, 0.0).sum()

    loss = rows.sum(cross_entropies(images) + cross_entropies(texts)) * (0.5 / count)
    return loss, _Lines(images.log_total(), texts.log_total(), jnp.maximum(images.same, 1.0))


def _device_backward(settings, image_features, text_features, temperature, pairs, lines, cotangent):
    """Gradients of the device's own image and text features, and of the temperature."""
    rows, s = settings.rows, settings.label_smoothing
    table = candidates.table(rows, text_features, pairs, settings.block)
    count = table.count()
    size = table.texts.shape[1]
    text_total, text_same = (candidates.in_blocks(rows.gather(x), size) for x in (lines.text_total, lines.same))

    def step(sums, xs):
        d_images, d_temperature = sums
        block, texts, text_total, text_same = xs
        cosines = candidates.query_cosines(image_features, texts)
        logits = cosines.max(1) / temperature
        same, real = table.same(block).astype(jnp.float32), table.real(block)

        def by_logit(total: jax.Array, number_same: jax.Array) -> jax.Array:
            probability = jnp.exp(logits - total)
            gradient = (1 - s) * (probability - same / number_same) + s * (probability - 1 / count)
            return jnp.where(real, gradient, 0.0) * (0.5 * cotangent / count)

        of_images = by_logit(lines.image_total[:, None], lines.same[:, None])
        of_texts = by_logit(text_total[None], jnp.maximum(text_same, 1.0)[None])
        both = of_images + of_texts
        d_temperature -= (both * logits).sum() / temperature
        best = jnp.arange(cosines.shape[1])[None, :, None] == cosines.argmax(1)[:, None]
        spread = lambda gradient: jnp.where(best, (gradient / temperature)[:, None], 0.0)  # [b, Q, C]
        for_images = spread(both if settings.gather_gradient else of_images)
        for_texts = for_images if settings.gather_gradient else spread(of_texts)
        d_images += _product("bqc,ce->bqe", for_images, texts)
        return (d_images, d_temperature), _product("bqc,bqe->ce", for_texts, image_features)

    start = (jnp.zeros_like(image_features), jnp.float32(0))
    xs = (table.blocks, table.texts, text_total, text_same)
    (d_images, d_temperature), d_texts = jax.lax.scan(step, start, xs)
    d_texts = rows.scatter_sum(candidates.from_blocks(d_texts, len(text_features) * rows.shards))
    return d_images, d_texts, rows.sum(d_temperature)
