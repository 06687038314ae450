"""Next-token cross-entropy for ITG and for the frozen language model, without the [tokens, vocabulary] logits.

Most positions of a padded batch have no target. Every device moves those of its rows that have one to the front and
takes them through the decoder matrix in blocks; the number of blocks depends on the data, so padding costs nothing. The
gradient is formed in the same sweep, while a block's logits exist: with a frozen matrix that is two matrix products in
all. The matrix is divided over the mesh axis `tensor` by vocabulary where that divides it.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from blip2_jax.parallel.rows import Rows, rows_of

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


def token_weights(mask: jax.Array, ranks: int = 1) -> jax.Array:
    """What each token weighs in a mean over tokens: float32[B, T], of sum 1, or 0 where no token counts.

    Args:
      mask: bool[B, T], the tokens that count; of the whole batch, also where it goes through in pieces.
      ranks: into how many equal runs of rows the batch falls, each of which takes the mean over its own tokens before
        the mean over runs is taken (the original's, whose processes did so); a run without tokens does not count.

    Raises:
      ValueError: the rows do not divide into so many runs.
    """
    if ranks < 1 or mask.shape[0] % ranks:
        raise ValueError(
            f"a token mean by rank: {mask.shape[0]} rows do not divide into {ranks} ranks; choose a compat.world_size "
            "that divides the batch"
        )
    by_rank = mask.astype(jnp.float32).reshape(ranks, -1)
    tokens = by_rank.sum(1, keepdims=True)
    present = jnp.maximum((tokens > 0).sum(), 1)
    return (by_rank / (jnp.maximum(tokens, 1) * present)).reshape(mask.shape)


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """How the V rows of a decoder matrix lie on the mesh, and what its owners tell each other.

    Attributes:
      size: V.
      axis: the mesh axis that divides them, or None.
    """

    size: int
    axis: str | None

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(self.axis)

    def sum(self, x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, self.axis) if self.axis else x

    def max(self, x: jax.Array) -> jax.Array:
        return jax.lax.pmax(x, self.axis) if self.axis else x

    def first(self, own: int) -> jax.Array | int:
        """The token of this device's first row, of which it has so many."""
        return jax.lax.axis_index(self.axis) * own if self.axis else 0


def _vocabulary(rows: Rows, size: int) -> _Vocabulary:
    shards = rows.mesh.shape["tensor"] if rows.mesh is not None else 1
    return _Vocabulary(size, "tensor" if shards > 1 and size % shards == 0 else None)


def _block_loss(features, matrix, bias, targets, weights, label_smoothing, vocabulary: _Vocabulary):
    """Weighted losses of some tokens, and their gradient by this device's logits: float32[C], float32[C, v]."""
    logits = jnp.einsum("cd,vd->cv", features, matrix, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias[None]
    own = logits.shape[-1]
    hot = jnp.arange(own)[None] + vocabulary.first(own) == targets[:, None]
    maximum = vocabulary.max(logits.max(-1))
    exponent = jnp.exp(logits - maximum[:, None])
    total = vocabulary.sum(exponent.sum(-1))
    loss = jnp.log(total) + maximum - (1 - label_smoothing) * vocabulary.sum(jnp.where(hot, logits, 0.0).sum(-1))
    if label_smoothing:
        loss = loss - label_smoothing / vocabulary.size * vocabulary.sum(logits.sum(-1))
    gradient = exponent / total[:, None] - label_smoothing / vocabulary.size
    return loss * weights, (gradient - jnp.where(hot, 1 - label_smoothing, 0.0)) * weights[:, None]


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """This device's tokens, those that count first, in blocks of `size`.

    Attributes:
      order: int[N], which token stands where.
      size: C.
      count: how many blocks hold a token that counts, on the device that has most: collectives inside a loop over
        blocks need it to be as long everywhere.
    """

    order: jax.Array
    size: int
    count: jax.Array

    def take(self, x: jax.Array) -> jax.Array:
        """[N, ...] in that order, filled up to whole blocks."""
        return jnp.pad(x[self.order], ((0, -len(x) % self.size),) + ((0, 0),) * (x.ndim - 1))

    def put(self, x: jax.Array) -> jax.Array:
        """What `take` gave, back where it was."""
        return jnp.zeros((len(self.order), *x.shape[1:]), x.dtype).at[self.order].set(x[: len(self.order)])


def _blocks(weights: jax.Array, rows: Rows) -> _Blocks:
    size = min(_BLOCK_ROWS, len(weights))
    count = -(-(weights != 0).sum() // size)
    return _Blocks(jnp.argsort(weights == 0, stable=True), size, rows.max(count))


def _flat(*arrays: jax.Array) -> list[jax.Array]:
    return [x.reshape(-1, *x.shape[2:]) for x in arrays]


def token_losses(
    features: jax.Array,
    matrix: jax.Array,
    bias: jax.Array | None,
    targets: jax.Array,
    weights: jax.Array,
    *,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Weighted loss of each token, float32[B, T] in nats; forward only. Arguments as `language_modeling_loss`."""
    rows = rows_of(features.shape[0])
    vocabulary = _vocabulary(rows, matrix.shape[0])

    def sweep(features, matrix, bias, targets, weights):
        shape = targets.shape
        features, targets, weights = _flat(features, targets, weights)
        blocks = _blocks(weights, rows)
        tokens = [blocks.take(x) for x in (features, targets, weights)]

        def body(index, losses):
            x, y, w = (jax.lax.dynamic_slice_in_dim(a, index * blocks.size, blocks.size) for a in tokens)
            loss, _ = _block_loss(x, matrix, bias, y, w, label_smoothing, vocabulary)
            return jax.lax.dynamic_update_slice_in_dim(losses, loss, index * blocks.size, 0)

        losses = jax.lax.fori_loop(0, blocks.count, body, jnp.zeros(len(tokens[0]), jnp.float32))
        return blocks.put(losses).reshape(shape)

    in_specs = (rows.spec, vocabulary.spec, vocabulary.spec, rows.spec, rows.spec)
    return rows.map(sweep, in_specs, rows.spec)(features, matrix, bias, targets, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _loss_sum(features, matrix, bias, targets, weights, label_smoothing, frozen_head):
    return token_losses(features, matrix, bias, targets, weights, label_smoothing=label_smoothing).sum()


def _loss_sum_forward(features, matrix, bias, targets, weights, label_smoothing, frozen_head):
    rows = rows_of(features.shape[0])
    vocabulary = _vocabulary(rows, matrix.shape[0])
    sweep = functools.partial(
        _sweep, rows=rows, vocabulary=vocabulary, label_smoothing=label_smoothing, frozen_head=frozen_head
    )
    head = vocabulary.spec
    in_specs = (rows.spec, head, head, rows.spec, rows.spec)
    out_specs = (PartitionSpec(), (rows.spec, head, head))
    return rows.map(sweep, in_specs, out_specs)(features, matrix, bias, targets, weights)


def _sweep(features, matrix, bias, targets, weights, *, rows, vocabulary, label_smoothing, frozen_head):
    """Sum of the losses of all devices' tokens, and the gradients by features, matrix and bias."""
    shape, dtype = features.shape, features.dtype
    features, targets, weights = _flat(features, targets, weights)
    blocks = _blocks(weights, rows)
    tokens = [blocks.take(x) for x in (features, targets, weights)]

    def body(index, carry):
        total, d_features, d_matrix, d_bias = carry
        x, y, w = (jax.lax.dynamic_slice_in_dim(a, index * blocks.size, blocks.size) for a in tokens)
        loss, d_logits = _block_loss(x, matrix, bias, y, w, label_smoothing, vocabulary)
        d_logits_low = d_logits.astype(dtype)
        d_x = vocabulary.sum(jnp.einsum("cv,vd->cd", d_logits_low, matrix, preferred_element_type=jnp.float32))
        d_features = jax.lax.dynamic_update_slice_in_dim(d_features, d_x, index * blocks.size, 0)
        if not frozen_head:
            d_matrix += jnp.einsum("cv,cd->vd", d_logits_low, x, preferred_element_type=jnp.float32)
            d_bias = None if bias is None else d_bias + d_logits.sum(0)
        return total + loss.sum(), d_features, d_matrix, d_bias

    zeros = lambda x: None if x is None or frozen_head else jnp.zeros(x.shape, jnp.float32)
    start = (jnp.float32(0), jnp.zeros(tokens[0].shape, jnp.float32), zeros(matrix), zeros(bias))
    total, d_features, d_matrix, d_bias = jax.lax.fori_loop(0, blocks.count, body, start)
    summed = lambda gradient, x: None if gradient is None else rows.sum(gradient).astype(x.dtype)
    d_features = blocks.put(d_features).reshape(shape).astype(dtype)
    return rows.sum(total), (d_features, summed(d_matrix, matrix), summed(d_bias, bias))


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
    weights: jax.Array,
    *,
    label_smoothing: float = 0.0,
    frozen_head: bool = False,
) -> jax.Array:
    """Weighted sum of the tokens' cross-entropies: with `token_weights` a mean, and pieces of a batch add up to it.

    Args:
      features: float[B, T, D], what the decoder matrix is applied to.
      matrix: float[V, D]; logits are features @ matrix.T + bias, accumulated in fp32.
      bias: float[V] or None.
      targets: int[B, T].
      weights: float32[B, T]; a token of weight 0 is not looked at. They have no gradient.
      label_smoothing: s: the target is (1 - s) on the token and s spread over the vocabulary.
      frozen_head: give `matrix` and `bias` no gradient.

    Returns:
      float32[] nats.
    """
    with jax.named_scope("language_modeling_loss"):  # Its loop is known by this name in a compiled program.
        return _loss_sum(features, matrix, bias, targets, weights, label_smoothing, frozen_head)
