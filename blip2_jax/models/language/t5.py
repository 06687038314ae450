"""T5 v1.1 and Flan-T5 (arXiv 1910.10683, 2210.11416): an encoder-decoder with relative positions and gated GELU.

The soft prompt stands at the beginning of the encoder's input; the decoder writes. Neither has absolute positions, and
attention is not scaled by the size of a head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip2_jax.models.language.decoder import update_cache
from blip2_jax.models.layers import (
    ACTIVATIONS,
    Dense,
    DenseGeneral,
    Dropout,
    KeyValue,
    RMSNorm,
    dot_product_attention,
)

# What the decoder reads before the first word (decoder_start_token_id).
START = 0


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes; the names in brackets are those of a Hugging Face config.json.

    Attributes:
      vocab_size: V.
      width: D (d_model).
      encoder_layers, decoder_layers: (num_layers, num_decoder_layers).
      heads, head_size, mlp_width: H, d, and of the feed-forward (num_heads, d_kv, d_ff).
      activation: of the gate; stock Flan-T5 has "gelu_tanh", LAVIS and its released weights the exact "gelu".
      buckets, max_distance: of the relative positions (relative_attention_num_buckets, ..._max_distance).
      norm_epsilon: of every norm (layer_norm_epsilon).
      dropout: share dropped of the embeddings, the attention weights, what attention and feed-forward add, the inner
        values of the feed-forward, and the output of a stack, where rows are given for it (dropout_rate).
      dtype: of the matrix products; norms and softmax stay fp32.
      remat: recompute a layer in the backward pass instead of keeping its activations.
      unroll: layers a step of the scans runs.
    """

    vocab_size: int
    width: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    head_size: int
    mlp_width: int
    activation: str = "gelu"
    buckets: int = 32
    max_distance: int = 128
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    unroll: int = 1


def relative_buckets(distance: jax.Array, bidirectional: bool, buckets: int, max_distance: int) -> jax.Array:
    """Bucket of each distance (place of what is seen minus place of who looks), int of the same shape.

    Near distances have a bucket each, far ones share buckets of logarithmic width; a decoder does not look ahead.
    """
    if bidirectional:
        buckets //= 2
        ahead, distance = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
    else:
        ahead, distance = 0, jnp.maximum(-distance, 0)
    # Not on the device, whose logarithm could put a distance at the edge of a bucket into its neighbour.
    exact, every = buckets // 2, np.arange(max_distance + 1, dtype=np.float32)
    logarithm = np.log(np.maximum(every, 1) / exact) / np.float32(math.log(max_distance / exact))
    far = np.minimum(exact + (logarithm * (buckets - exact)).astype(int), buckets - 1)
    table = jnp.asarray(np.where(every < exact, every, far), jnp.int32)
    return ahead + table[jnp.minimum(distance, max_distance)]


class RelativeBias(nn.Module):
    """What attention adds by distance, the same in every layer of a stack."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, looking: jax.Array, seen: jax.Array) -> jax.Array:
        """Places int[T] and int[S] -> float32[1, H, T, S]."""
        c = self.config
        distance = seen[None, :] - looking[:, None]
        table = nn.Embed(c.buckets, c.heads, name="buckets")
        bias = table(relative_buckets(distance, self.bidirectional, c.buckets, c.max_distance))
        return jnp.moveaxis(bias, -1, 0)[None].astype(jnp.float32)


class Attention(nn.Module):
    """Pre-norm attention with its residual; to itself, or to keys and values that are given."""

    config: T5Config

    @nn.compact
    def __call__(self, x, given: KeyValue | None, cache: KeyValue | None, offset, mask, bias, dropout_rows):
        c = self.config
        heads = lambda name: DenseGeneral((c.heads, c.head_size), use_bias=False, dtype=c.dtype, name=name)
        h = RMSNorm(c.norm_epsilon, c.dtype, name="norm")(x)
        query = heads("query")(h)
        if given is None:
            given, cache = update_cache(cache, heads("key")(h), heads("value")(h), offset)
        h = dot_product_attention(
            query,
            given.key,
            given.value,
            mask,
            bias=bias,
            scale=1.0,
            dropout_rate=c.dropout,
            dropout_key=None if dropout_rows is None else self.make_rng("dropout"),
            dropout_rows=dropout_rows,
        )
        h = DenseGeneral(c.width, axis=(-2, -1), use_bias=False, dtype=c.dtype, name="output")(h)
        return x + Dropout(c.dropout)(h, dropout_rows), cache


class FeedForward(nn.Module):
    """Pre-norm gated feed-forward with its residual."""

    config: T5Config

    @nn.compact
    def __call__(self, x, dropout_rows):
        c = self.config
        dense = lambda width, name: Dense(width, use_bias=False, dtype=c.dtype, name=name)
        h = RMSNorm(c.norm_epsilon, c.dtype, name="norm")(x)
        h = ACTIVATIONS[c.activation](dense(c.mlp_width, "gate")(h)) * dense(c.mlp_width, "up")(h)
        h = dense(c.width, "down")(Dropout(c.dropout)(h, dropout_rows))
        return x + Dropout(c.dropout)(h, dropout_rows)


class EncoderLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x, _, mask, bias, dropout_rows):
        x, _ = Attention(self.config, name="attention")(x, None, None, 0, mask, bias, dropout_rows)
        return FeedForward(self.config, name="mlp")(x, dropout_rows), None


class DecoderLayer(nn.Module):
    config: T5Config

    @nn.compact
    def __call__(self, x, encoded: KeyValue, cache: KeyValue | None, offset, mask, bias, encoder_mask, dropout_rows):
        x, cache = Attention(self.config, name="attention")(x, None, cache, offset, mask, bias, dropout_rows)
        x, _ = Attention(self.config, name="cross_attention")(x, encoded, None, 0, encoder_mask, None, dropout_rows)
        return FeedForward(self.config, name="mlp")(x, dropout_rows), cache


class EncoderProjection(nn.Module):
    """Encoder output to the keys and values of one decoder layer's cross-attention; scanned over the layers."""

    config: T5Config

    @nn.compact
    def __call__(self, encoded, _):
        c = self.config
        heads = lambda name: DenseGeneral((c.heads, c.head_size), use_bias=False, dtype=c.dtype, name=name)
        return encoded, KeyValue(heads("key")(encoded), heads("value")(encoded))


class Encoded(NamedTuple):
    """What the decoder reads.

    Attributes:
      layers: keys and values float[L, B, S, H, d] for the cross-attention of each decoder layer.
      mask: bool[B, S].
    """

    layers: KeyValue
    mask: jax.Array


class Sight(NamedTuple):
    """Who may be seen in the cache of `T5.decode`, where tokens are not those of one text in their order.

    Attributes:
      looking: int[T], the place of each token in its text.
      places: int[S], that of each slot.
      seen: bool[B or 1, 1, T, S].
    """

    looking: jax.Array
    places: jax.Array
    seen: jax.Array


class T5(nn.Module):
    """Encoder and decoder; see the methods. The head is not tied to the embeddings."""

    config: T5Config

    def setup(self):
        c = self.config
        scan = lambda layer, length, in_axes: nn.scan(
            nn.remat(layer, prevent_cse=False) if c.remat else layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=in_axes,
            length=length,
            unroll=c.unroll,
        )(c)
        self.embeddings = nn.Embed(c.vocab_size, c.width, dtype=c.dtype)
        self.lm_head = nn.Embed(c.vocab_size, c.width)
        self.encoder_bias = RelativeBias(c, bidirectional=True)
        self.encoder = scan(EncoderLayer, c.encoder_layers, (0, *[nn.broadcast] * 3))
        self.encoder_norm = RMSNorm(c.norm_epsilon, c.dtype)
        self.encoder_projection = scan(EncoderProjection, c.decoder_layers, 0)
        self.decoder_bias = RelativeBias(c, bidirectional=False)
        self.decoder = scan(DecoderLayer, c.decoder_layers, (0, 0, *[nn.broadcast] * 5))
        self.decoder_norm = RMSNorm(c.norm_epsilon, c.dtype)
        self.encoder_dropout, self.decoder_dropout = Dropout(c.dropout), Dropout(c.dropout)

    def embed(self, token_ids: jax.Array) -> jax.Array:
        """int[B, T] -> float[B, T, D]."""
        return self.embeddings(token_ids)

    def encode_hidden(
        self, inputs_embeds: jax.Array, mask: jax.Array, dropout_rows: jax.Array | None = None
    ) -> jax.Array:
        """float[B, S, D], bool[B, S], for dropout uint32[B] -> float[B, S, D], behind the encoder's last norm."""
        places = jnp.arange(inputs_embeds.shape[1])
        bias = self.encoder_bias(places, places)
        x = self.encoder_dropout(inputs_embeds.astype(self.config.dtype), dropout_rows)
        x, _ = self.encoder(x, None, mask.astype(bool)[:, None, None], bias, dropout_rows)
        return self.encoder_dropout(self.encoder_norm(x), dropout_rows)

    def encode(self, inputs_embeds: jax.Array, mask: jax.Array, dropout_rows: jax.Array | None = None) -> Encoded:
        """The same as keys and values for `decode`."""
        _, layers = self.encoder_projection(self.encode_hidden(inputs_embeds, mask, dropout_rows), None)
        return Encoded(layers, mask.astype(bool))

    def decode(
        self,
        encoded: Encoded,
        inputs_embeds: jax.Array,
        cache: KeyValue | None = None,
        offset: jax.Array | int = 0,
        dropout_rows: jax.Array | None = None,
        sight: Sight | None = None,
        apart: Sequence[tuple[dict, KeyValue]] | None = None,
    ) -> tuple[jax.Array, KeyValue | tuple[KeyValue, ...] | None]:
        """Hidden states after the last norm.

        Args:
          encoded: of `encode`.
          inputs_embeds: float[B, T, D], the start token first.
          cache: of `empty_cache`; these tokens are written to its slots offset .. offset + T.
          offset: first free slot.
          dropout_rows: uint32[B] of `layers.Dropout`; None: nothing is dropped.
          sight: who sees whom; None: the tokens are those of one text in its order, and see those before them.
          apart: of `one_by_one`, the parameters of each layer of the decoder and what it reads of `encoded`; the cache
            is then a tuple of theirs, too. Otherwise the layers are scanned.

        Returns:
          float[B, T, D] and the grown cache (None if there was none).
        """
        if sight is None:
            looking = offset + jnp.arange(inputs_embeds.shape[1])
            places = jnp.arange(inputs_embeds.shape[1] if cache is None else cache.key.shape[2])
            sight = Sight(looking, places, (places[None, :] <= looking[:, None])[None, None])
        bias = self.decoder_bias(sight.looking, sight.places)
        encoder_mask = encoded.mask[:, None, None]
        x = self.decoder_dropout(inputs_embeds.astype(self.config.dtype), dropout_rows)
        rest = offset, sight.seen, bias, encoder_mask, dropout_rows
        if apart is None:
            x, cache = self.decoder(x, encoded.layers, cache, *rest)
        else:
            layer, grown = DecoderLayer(self.config, parent=None), []
            for (parameters, read), own in zip(apart, cache, strict=True):
                x, own = layer.apply({"params": parameters}, x, read, own, *rest)
                grown.append(own)
            cache = tuple(grown)
        return self.decoder_dropout(self.decoder_norm(x), dropout_rows), cache

    def head(self) -> jax.Array:
        """float[V, D]: logits are hidden @ head.T."""
        return self.lm_head.embedding

    def initialize(self, token_ids: jax.Array) -> jax.Array:
        """A pass that touches every parameter: int[B, T] -> logits float[B, T, V]."""
        embeds = self.embed(token_ids)
        hidden, _ = self.decode(self.encode(embeds, jnp.ones(token_ids.shape, bool)), embeds)
        return hidden @ self.head().T


def empty_cache(config: T5Config, batch: int, length: int) -> KeyValue:
    """float[L, B, S, H, d] of zeros, twice: room for `length` tokens of the decoder."""
    shape = (config.decoder_layers, batch, length, config.heads, config.head_size)
    return KeyValue(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
