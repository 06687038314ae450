"""The Llama family of decoders: RMSNorm, rotary positions, grouped-query attention, SwiGLU (arXiv 2302.13971).

Takes embeddings, so that a soft prompt can stand before the words, and returns hidden states: how much of the logits
exists at once is for the loss or the decoder to decide.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip2_jax.models.layers import KeyValue, dot_product_attention


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes; the names on the right are those of a Hugging Face config.json.

    Attributes:
      vocab_size: V.
      width: D (hidden_size).
      layers: L (num_hidden_layers).
      heads, kv_heads: H query heads share K key heads (num_attention_heads, num_key_value_heads).
      head_size: d (head_dim).
      mlp_width: (intermediate_size).
      norm_epsilon: (rms_norm_eps).
      rope_theta: base of the rotary frequencies.
      tied_head: logits use the word embeddings (tie_word_embeddings).
      dtype: of the matrix products; norms, rotary angles and softmax stay fp32.
      remat: recompute a layer in the backward pass instead of keeping its activations.
      unroll: layers a step of the scan runs.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    norm_epsilon: float = 1e-5
    rope_theta: float = 10_000.0
    tied_head: bool = True
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    unroll: int = 1


class RMSNorm(nn.Module):
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.epsilon)
        return (x * scale).astype(self.dtype)


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864), the two halves of a head turning against each other.

    Args:
      x: float[B, T, H, d].
      positions: int[B, T].
      theta: base of the frequencies.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


class LlamaLayer(nn.Module):
    """One layer. As the body of a scan its carry is the hidden state, its input and output the layer's cache."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x, cache: KeyValue | None, positions, mask, offset):
        c = self.config
        heads = lambda count, name: nn.DenseGeneral((count, c.head_size), use_bias=False, dtype=c.dtype, name=name)
        h = RMSNorm(c.norm_epsilon, c.dtype, name="attention_norm")(x)
        query = rotate(heads(c.heads, "query")(h), positions, c.rope_theta)
        key = rotate(heads(c.kv_heads, "key")(h), positions, c.rope_theta)
        value = heads(c.kv_heads, "value")(h)
        if cache is not None:
            key = jax.lax.dynamic_update_slice_in_dim(cache.key, key, offset, axis=1)
            value = jax.lax.dynamic_update_slice_in_dim(cache.value, value, offset, axis=1)
            cache = KeyValue(key, value)
        h = dot_product_attention(query, key, value, mask)
        x = x + nn.DenseGeneral(c.width, axis=(-2, -1), use_bias=False, dtype=c.dtype, name="output")(h)

        dense = lambda width, name: nn.Dense(width, use_bias=False, dtype=c.dtype, name=name)
        h = RMSNorm(c.norm_epsilon, c.dtype, name="mlp_norm")(x)
        h = jax.nn.silu(dense(c.mlp_width, "gate")(h)) * dense(c.mlp_width, "up")(h)
        return x + dense(c.width, "down")(h), cache


class Llama(nn.Module):
    """A decoder that accepts embeddings; see the methods."""

    config: LlamaConfig

    def setup(self):
        c = self.config
        self.embeddings = nn.Embed(c.vocab_size, c.width, dtype=c.dtype)
        layer = nn.remat(LlamaLayer, prevent_cse=False) if c.remat else LlamaLayer
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.layers,
            unroll=c.unroll,
        )(c)
        self.norm = RMSNorm(c.norm_epsilon, c.dtype)
        if not c.tied_head:
            self.lm_head = nn.Embed(c.vocab_size, c.width)

    def embed(self, token_ids: jax.Array) -> jax.Array:
        """int[B, T] -> float[B, T, D]."""
        return self.embeddings(token_ids)

    def __call__(
        self,
        inputs_embeds: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: KeyValue | None = None,
        offset: jax.Array | int = 0,
    ) -> tuple[jax.Array, KeyValue | None]:
        """Hidden states after the last norm.

        Args:
          inputs_embeds: float[B, T, D].
          positions: int[B, T], for the rotary embedding.
          mask: bool[B or 1, 1, T, S], who may be seen; S is T without a cache and the cache's length with one.
          cache: of `empty_cache`; these tokens are written to its slots offset .. offset + T.
          offset: first free slot.

        Returns:
          float[B, T, D] and the grown cache (None if there was none).
        """
        x, cache = self.layers(inputs_embeds.astype(self.config.dtype), cache, positions, mask, offset)
        return self.norm(x), cache

    def head(self) -> jax.Array:
        """float[V, D]: logits are hidden @ head.T."""
        return (self.embeddings if self.config.tied_head else self.lm_head).embedding

    def initialize(self, token_ids: jax.Array) -> jax.Array:
        """A pass that touches every parameter."""
        length = token_ids.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length), token_ids.shape)
        hidden, _ = self(self.embed(token_ids), positions, jnp.ones((1, 1, length, length), bool))
        return hidden @ self.head().T


def empty_cache(config: LlamaConfig, batch: int, length: int) -> KeyValue:
    """float[L, B, S, K, d] of zeros, twice: room for `length` tokens."""
    shape = (config.layers, batch, length, config.kv_heads, config.head_size)
    return KeyValue(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
