"""Image-text contrastive learning, ITC (paper section 3.2): every image against every caption of the global batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def same_pairs(image_id: jax.Array, text_id: jax.Array, example_mask: jax.Array) -> jax.Array:
    """Which rows show the same picture or carry the same caption: the one relation of ITC targets and ITM negatives.

    Args:
      image_id: uint32[B, 2].
      text_id: uint32[B, 2].
      example_mask: bool[B]; a False row is the same as nothing but itself.

    Returns:
      bool[B, B], symmetric, True on the diagonal.
    """
    equal = lambda ids: (ids[:, None] == ids[None, :]).all(-1)
    real = example_mask[:, None] & example_mask[None, :]
    return ((equal(image_id) | equal(text_id)) & real) | jnp.eye(len(example_mask), dtype=bool)


def similarities(image_features: jax.Array, text_features: jax.Array) -> jax.Array:
    """Cosine of each caption with the query that fits it best.

    Args:
      image_features: float[B, Q, E], unit length.
      text_features: float[N, E], unit length.

    Returns:
      float32[B, N]: row i is image i against all captions; transposed, a caption against all images.
    """
    return jnp.einsum("bqe,ne->bnq", image_features, text_features, preferred_element_type=jnp.float32).max(-1)


def contrastive_loss(
    similarity: jax.Array,
    temperature: jax.Array,
    same: jax.Array,
    example_mask: jax.Array,
    label_smoothing: float = 0.1,
) -> jax.Array:
    """Mean of the image-to-text and the text-to-image cross-entropy.

    The target of a row is (1 - s) spread evenly over the same pairs plus s spread evenly over all real candidates; with
    no duplicates in the batch that is label smoothing exactly.

    Args:
      similarity: float32[B, B], images by captions, cosines.
      temperature: float32[], the divisor of the cosines.
      same: bool[B, B] of `same_pairs`.
      example_mask: bool[B]; False rows are neither anchors nor candidates.

    Returns:
      float32[], nats.
    """
    weight = example_mask.astype(jnp.float32)
    count = jnp.maximum(weight.sum(), 1.0)
    same = same.astype(jnp.float32) * weight[None, :]
    target = (1 - label_smoothing) * same / jnp.maximum(same.sum(-1, keepdims=True), 1.0)
    target += label_smoothing * weight[None, :] / count

    def one_direction(logits: jax.Array) -> jax.Array:
        logits = jnp.where(example_mask[None, :], logits / temperature, jnp.finfo(jnp.float32).min)
        log_probability = jnp.where(example_mask[None, :], jax.nn.log_softmax(logits, axis=-1), 0.0)
        return -(target * log_probability).sum(-1) @ weight / count

    return 0.5 * (one_direction(similarity) + one_direction(similarity.T))
