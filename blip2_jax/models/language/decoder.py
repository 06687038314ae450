"""What every decoder language model shares; a model of a family says only what its layer is.

It takes embeddings, so that a soft prompt can stand before the words, and returns hidden states: how much of the logits
exists at once is for the loss or the decoding loop to decide. Layers are scanned, the cache has static shapes.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip2_jax.models.layers import KeyValue


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes that every family has; the names in brackets are those of a Hugging Face config.json.

    Attributes:
      vocab_size: V.
      width: D (hidden_size).
      layers: L (num_hidden_layers).
      heads, kv_heads: H query heads share K key heads (num_attention_heads, num_key_value_heads).
      head_size: d (head_dim).
      mlp_width: (intermediate_size, ffn_dim).
      norm_epsilon: of every norm.
      tied_head: logits use the word embeddings (tie_word_embeddings).
      dtype: of the matrix products; norms, positions and softmax stay fp32.
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
    tied_head: bool = True
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    unroll: int = 1


class Decoder(nn.Module):
    """A family's subclass names its layer and its last norm, and what it adds to the embeddings.

    The layer is the body of a scan: (x, cache or None, positions, mask, offset, dropout_rows) -> x and the cache.
    """

    config: DecoderConfig

    @abc.abstractmethod
    def layer(self) -> type[nn.Module]:
        """The class of a layer, made with the config alone."""

    @abc.abstractmethod
    def last_norm(self) -> nn.Module:
        """What stands between the last layer and the head."""

    def setup(self):
        c = self.config
        self.embeddings = nn.Embed(c.vocab_size, c.width, dtype=c.dtype)
        self.layers = nn.scan(
            nn.remat(self.layer(), prevent_cse=False) if c.remat else self.layer(),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *[nn.broadcast] * 4),
            length=c.layers,
            unroll=c.unroll,
        )(c)
        self.norm = self.last_norm()
        if not c.tied_head:
            self.lm_head = nn.Embed(c.vocab_size, c.width)

    def embed(self, token_ids: jax.Array) -> jax.Array:
        """int[B, T] -> float[B, T, D]."""
        return self.embeddings(token_ids)

    def place(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Add absolute positions int[B, T] to float[B, T, D], in families that have them."""
        return x

    def __call__(
        self,
        inputs_embeds: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: KeyValue | None = None,
        offset: jax.Array | int = 0,
        dropout_rows: jax.Array | None = None,
        apart: Sequence[dict] | None = None,
    ) -> tuple[jax.Array, KeyValue | tuple[KeyValue, ...] | None]:
        """Hidden states after the last norm.

        Args:
          inputs_embeds: float[B, T, D].
          positions: int[B, T], counted from 0.
          mask: bool[B or 1, 1, T, S], who may be seen; S is T without a cache and the cache's length with one.
          cache: of `empty_cache`; these tokens are written to its slots offset .. offset + T.
          offset: first free slot.
          dropout_rows: uint32[B] of `layers.Dropout`, in families that have dropout; None: nothing is dropped.
          apart: of `one_by_one`, the parameters of each layer; the cache is then a tuple of theirs, too. Otherwise the
            layers are scanned.

        Returns:
          float[B, T, D] and the grown cache (None if there was none).
        """
        x = self.place(inputs_embeds.astype(self.config.dtype), positions)
        if apart is None:
            x, cache = self.layers(x, cache, positions, mask, offset, dropout_rows)
            return self.norm(x), cache
        layer, grown = self.layer()(self.config, parent=None), []
        for parameters, own in zip(apart, cache, strict=True):
            x, own = layer.apply({"params": parameters}, x, own, positions, mask, offset, dropout_rows)
            grown.append(own)
        return self.norm(x), tuple(grown)

    def head(self) -> jax.Array:
        """float[V, D]: logits are hidden @ head.T."""
        return (self.embeddings if self.config.tied_head else self.lm_head).embedding

    def initialize(self, token_ids: jax.Array) -> jax.Array:
        """A pass that touches every parameter: int[B, T] -> logits float[B, T, V]."""
        length = token_ids.shape[1]
        positions = jnp.broadcast_to(jnp.arange(length), token_ids.shape)
        hidden, _ = self(self.embed(token_ids), positions, jnp.ones((1, 1, length, length), bool))
        return hidden @ self.head().T


def one_by_one(stacked: Any) -> tuple[Any, ...]:
    """From what is stacked over layers, [L, ...] at every leaf, what each has."""
    count = len(jax.tree.leaves(stacked)[0])
    return tuple(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count))


def update_cache(cache: KeyValue | None, key: jax.Array, value: jax.Array, offset) -> tuple[KeyValue, KeyValue | None]:
    """What a layer attends to, and its grown cache: its own keys and values float[B, T, K, d] without a cache."""
    if cache is None:
        return KeyValue(key, value), None
    grown = KeyValue(
        jax.lax.dynamic_update_slice_in_dim(cache.key, key, offset, axis=1),
        jax.lax.dynamic_update_slice_in_dim(cache.value, value, offset, axis=1),
    )
    return grown, grown


def empty_cache(config: DecoderConfig, batch: int, length: int) -> KeyValue:
    """float[L, B, S, K, d] of zeros, twice: room for `length` tokens."""
    shape = (config.layers, batch, length, config.kv_heads, config.head_size)
    return KeyValue(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
