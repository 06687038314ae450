"""Next-token cross-entropy for ITG and for the frozen language model, without the [tokens, vocabulary] logits.

Most positions of a padded batch have no target. Rows with one are moved to the front and taken through the decoder
matrix in blocks; the number of blocks depends on the data, so padding costs nothing. The gradient is formed in the same
sweep, while a block's logits exist: with a frozen matrix that is two matrix products in all.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_BLOCK_ROWS = 128


def next_token_targets(token_ids: jax.Array, target_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Shift left by one: position t is to predict token t + 1.

    Args:
      token_ids: int[B, T].
      target_mask: bool[B, T], True where a token is to be predicted (so never the first).

    Returns:
      Targets int[B, T] and their mask bool[B, T]; the last position has none.
    """
    targets = jnp.pad(token_ids[:, 1:], ((0, 0), (0, 1)))
    mask = jnp.pad(target_mask[:, 1:].astype(bool), ((0, 0), (0, 1)))
    return targets, mask


def _block_loss(features, matrix, bias, targets, weights, label_smoothing):
    """Loss of some rows, and its gradient by the logits: float32[C], float32[C, V]."""
    logits = jnp.einsum("cd,vd->cv", features, matrix, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias[None]
    vocabulary = logits.shape[-1]
    maximum = logits.max(-1, keepdims=True)
    exponent = jnp.exp(logits - maximum)
    total = exponent.sum(-1, keepdims=True)
    log_total = jnp.log(total) + maximum
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    loss = log_total - (1 - label_smoothing) * picked
    if label_smoothing:
        loss = loss - label_smoothing / vocabulary * logits.sum(-1, keepdims=True)
    gradient = exponent / total - label_smoothing / vocabulary
    hot = jnp.arange(vocabulary)[None] == targets[:, None]
    gradient = (gradient - jnp.where(hot, 1 - label_smoothing, 0.0)) * weights[:, None]
    return loss[:, 0] * weights, gradient


def _compact(features, targets, weights):
    """Rows with a target first, padded to whole blocks; the order, and the number of blocks that hold any."""
    rows = features.shape[0]
    order = jnp.argsort(weights == 0, stable=True)
    pad = -rows % min(_BLOCK_ROWS, rows)
    fill = lambda x: jnp.pad(x[order], ((0, pad),) + ((0, 0),) * (x.ndim - 1))
    size = min(_BLOCK_ROWS, rows)
    blocks = -(-(weights != 0).sum() // size)
    return fill(features), fill(targets), fill(weights), order, size, blocks


def token_losses(
    features: jax.Array,
    matrix: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Weighted loss of each row, float32[N] in nats; forward only. Arguments as `language_modeling_loss`."""
    features, targets, weights, order, size, blocks = _compact(features, targets, weights)

    def body(index, losses):
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size)
        loss, _ = _block_loss(take(features), matrix, bias, take(targets), take(weights), label_smoothing)
        return jax.lax.dynamic_update_slice_in_dim(losses, loss, index * size, 0)

    losses = jax.lax.fori_loop(0, blocks, body, jnp.zeros(features.shape[0], jnp.float32))
    return jnp.zeros_like(losses, shape=order.shape).at[order].set(losses[: order.shape[0]])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _loss_sum(features, matrix, bias, targets, weights, label_smoothing, frozen_head):
    return token_losses(features, matrix, bias, targets, weights, label_smoothing).sum()


def _loss_sum_forward(features, matrix, bias, targets, weights, label_smoothing, frozen_head):
    rows = features.shape[0]
    dtype = features.dtype
    features, targets, weights, order, size, blocks = _compact(features, targets, weights)

    def body(index, carry):
        total, d_features, d_matrix, d_bias = carry
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size)
        x = take(features)
        loss, d_logits = _block_loss(x, matrix, bias, take(targets), take(weights), label_smoothing)
        d_logits_low = d_logits.astype(dtype)
        d_x = jnp.einsum("cv,vd->cd", d_logits_low, matrix, preferred_element_type=jnp.float32)
        d_features = jax.lax.dynamic_update_slice_in_dim(d_features, d_x, index * size, 0)
        if not frozen_head:
            d_matrix += jnp.einsum("cv,cd->vd", d_logits_low, x, preferred_element_type=jnp.float32)
            d_bias = None if bias is None else d_bias + d_logits.sum(0)
        return total + loss.sum(), d_features, d_matrix, d_bias

    zeros = lambda x: None if x is None or frozen_head else jnp.zeros(x.shape, jnp.float32)
    start = (jnp.float32(0), jnp.zeros(features.shape, jnp.float32), zeros(matrix), zeros(bias))
    total, d_features, d_matrix, d_bias = jax.lax.fori_loop(0, blocks, body, start)
    d_features = jnp.zeros((rows, features.shape[1]), jnp.float32).at[order].set(d_features[:rows])
    cast = lambda gradient, x: None if gradient is None else gradient.astype(x.dtype)
    return total, (d_features.astype(dtype), cast(d_matrix, matrix), cast(d_bias, bias))


def _loss_sum_backward(label_smoothing, frozen_head, gradients, cotangent):
    scale = lambda x: None if x is None else (x.astype(jnp.float32) * cotangent).astype(x.dtype)
    d_features, d_matrix, d_bias = gradients
    return scale(d_features), scale(d_matrix), scale(d_bias), None, None


_loss_sum.defvjp(_loss_sum_forward, _loss_sum_backward)


def language_modeling_loss(
    features: jax.Array,
    matrix: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    mask: jax.Array,
    *,
    label_smoothing: float = 0.0,
    frozen_head: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the cross-entropies of the tokens that `mask` marks, with their number: their ratio is the mean loss.

    Args:
      features: float[..., D], what the decoder matrix is applied to.
      matrix: float[V, D]; logits are features @ matrix.T + bias, accumulated in fp32.
      bias: float[V] or None.
      targets: int[...].
      mask: bool[...].
      label_smoothing: s: the target is (1 - s) on the token and s spread over the vocabulary.
      frozen_head: give `matrix` and `bias` no gradient.

    Returns:
      float32[] nats, float32[] tokens.
    """
    rows = features.reshape(-1, features.shape[-1])
    weights = mask.reshape(-1).astype(jnp.float32)
    loss = _loss_sum(rows, matrix, bias, targets.reshape(-1), weights, label_smoothing, frozen_head)
    return loss, weights.sum()
