"""What the Q-Former and the language models share: matrix products that can be adapted, attention, masks."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class KeyValue(NamedTuple):
    """Attention keys and values, float[..., B, S, H, d] each."""

    key: jax.Array
    value: jax.Array


def _adapted(module: nn.Module, x: jax.Array, output: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The output of a matrix product, and what the adapter beside its kernel adds, if there is one (`lora`).

    A sum of small products: neither the adapted kernel nor a gradient of its size ever exists.
    """
    if not module.has_variable("params", "lora_a"):
        return output
    a, b = (module.get_variable("params", name).astype(output.dtype) for name in ("lora_a", "lora_b"))
    inner = jax.lax.dot_general(x.astype(output.dtype), a, ((axes, tuple(range(len(axes)))), ((), ())))
    return output + jnp.tensordot(inner, b, 1)


class Dense(nn.Dense):
    """flax's, with the adapter that stands beside its kernel."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return _adapted(self, inputs, super().__call__(inputs), (inputs.ndim - 1,))


class DenseGeneral(nn.DenseGeneral):
    """flax's, with the adapter that stands beside its kernel."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        return _adapted(self, inputs, super().__call__(inputs), tuple(axis % inputs.ndim for axis in axes))


class RMSNorm(nn.Module):
    """float[..., D] over its root mean square, scaled; computed in fp32, then of `dtype`."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)


def dropout_mask(key: jax.Array, rows: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """bool[B, *shape], True where a value is kept; a function of the key and of each row's number alone.

    So the same values are dropped wherever a row is computed: on another mesh, or in another piece of the batch.

    Args:
      key: of this place in the model, this pass and this step.
      rows: uint32[B], the number of each row in the global batch.
      rate: share of values dropped.
      shape: of what a row has.
    """
    return jax.vmap(lambda row: jax.random.bernoulli(jax.random.fold_in(key, row), 1.0 - rate, shape))(rows)


class Dropout(nn.Module):
    """Dropout by row; needs the generator "dropout" where `rows` are given."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, rows: jax.Array | None) -> jax.Array:
        """float[B, ...]; `rows` uint32[B] of `dropout_mask`, None: nothing is dropped."""
        if rows is None or self.rate == 0.0:
            return x
        kept = dropout_mask(self.make_rng("dropout"), rows, self.rate, x.shape[1:])
        return jnp.where(kept, x / (1.0 - self.rate), 0.0).astype(x.dtype)


def attention_weights(
    query: jax.Array,
    key: jax.Array,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Who attends to whom, float32[B, H, T, S], each row summing to 1; arguments as `dot_product_attention`."""
    batch, length, heads, size = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, length, groups, heads // groups, size)
    logits = jnp.einsum("btkgd,bskd->bkgts", query, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, heads, length, key.shape[1]) * (size**-0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    dropout_rows: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with an fp32 softmax; groups of query heads may share a key head.

    Args:
      query: float[B, T, H, d].
      key: float[B, S, K, d]; K divides H, and query head h reads key head h // (H // K).
      value: float[B, S, K, d].
      mask: bool, broadcastable to [B, 1, T, S]; True where attention is allowed. A row that may see nothing attends
        evenly to everything instead of becoming NaN: its output is meaningless and must be masked by the caller.
      bias: float, broadcastable to [B, H, T, S], added to the scaled products (T5's relative positions).
      scale: of the products; by default d^-0.5.
      dropout_rate: share of attention weights dropped where `dropout_rows` are given.
      dropout_key, dropout_rows: of `dropout_mask`.

    Returns:
      float[B, T, H, d], in the dtype of `query`.
    """
    batch, length, heads, size = query.shape
    groups = key.shape[2]
    weights = attention_weights(query, key, mask, bias, scale).reshape(
        batch, groups, heads // groups, length, key.shape[1]
    )
    if dropout_rate > 0.0 and dropout_rows is not None:
        kept = dropout_mask(dropout_key, dropout_rows, dropout_rate, weights.shape[1:])
        weights = jnp.where(kept, weights / (1.0 - dropout_rate), 0.0)
    output = jnp.einsum("bkgts,bskd->btkgd", weights.astype(value.dtype), value)
    return output.reshape(batch, length, heads, size)


def causal_mask(length: int, past: int = 0) -> jax.Array:
    """bool[1, 1, length, past + length]: position t sees the past and the positions up to t.

    For length 3 and past 2 (rows: who looks; columns: what is seen)::

        1 1 1 0 0
        1 1 1 1 0
        1 1 1 1 1
    """
    return (jnp.arange(past + length) <= past + jnp.arange(length)[:, None])[None, None]
