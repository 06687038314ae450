"""The Q-Former: a BERT whose learned queries read an image by cross-attention (paper section 3.1, figure 2).

Queries and text share the self-attention of every layer and have feed-forward networks of their own. Which of them see
each other is the only difference between the three objectives of stage 1; `AttentionPattern` draws it.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip2_jax.models.layers import (
    Dense,
    DenseGeneral,
    Dropout,
    KeyValue,
    attention_weights,
    causal_mask,
    dot_product_attention,
)
from blip2_jax.parallel.rows import rows_of

_initializer = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former. The defaults are BERT-base's, as in the paper.

    Attributes:
      width: D, of queries and text alike.
      layers, heads, mlp_width: of the transformer.
      vocab_size: V, the BERT vocabulary and one more row, [DEC].
      max_positions: longest text, in tokens.
      cross_attention_every: layers 0, n, 2n, ... read the image.
      queries: Q, the number of learned query tokens.
      norm_epsilon: of every LayerNorm.
      dropout, attention_dropout: rates while training.
      remat: recompute a group of layers in the backward pass instead of keeping its activations.
      unroll: groups that one step of the scan runs; more is faster to run and slower to compile.
      dtype: of the matrix products; parameters, norms and softmax stay fp32.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    vocab_size: int = 30523
    max_positions: int = 512
    cross_attention_every: int = 2
    queries: int = 32
    norm_epsilon: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    remat: bool = False
    unroll: int = 1
    dtype: jnp.dtype = jnp.float32

    @property
    def scanned_groups(self) -> int:
        return self.layers // self.cross_attention_every

    @property
    def cross_attention_layers(self) -> int:
        return -(-self.layers // self.cross_attention_every)


class AttentionPattern(enum.Enum):
    """Who sees whom in self-attention (rows look, columns are seen; q queries, t text; padding is never seen).

    ::

        UNIMODAL (ITC)      BIDIRECTIONAL (ITM)   CAUSAL (ITG)
          q q t t t           q q t t t             q q t t t
        q 1 1 0 0 0         q 1 1 1 1 1           q 1 1 0 0 0
        q 1 1 0 0 0         q 1 1 1 1 1           q 1 1 0 0 0
        t 0 0 1 1 1         t 1 1 1 1 1           t 1 1 1 0 0
        t 0 0 1 1 1         t 1 1 1 1 1           t 1 1 1 1 0
        t 0 0 1 1 1         t 1 1 1 1 1           t 1 1 1 1 1
    """

    UNIMODAL = "unimodal"
    BIDIRECTIONAL = "bidirectional"
    CAUSAL = "causal"


def attention_mask(pattern: AttentionPattern, queries: int, text_mask: jax.Array) -> jax.Array:
    """bool[B, 1, Q + T, Q + T] for `queries` query tokens followed by text, `text_mask` bool[B, T]."""
    batch, length = text_mask.shape
    block = {
        AttentionPattern.UNIMODAL: lambda q, t: (jnp.zeros((q, t)), jnp.zeros((t, q)), jnp.ones((t, t))),
        AttentionPattern.BIDIRECTIONAL: lambda q, t: (jnp.ones((q, t)), jnp.ones((t, q)), jnp.ones((t, t))),
        AttentionPattern.CAUSAL: lambda q, t: (jnp.zeros((q, t)), jnp.ones((t, q)), causal_mask(t)[0, 0]),
    }[pattern]
    query_to_text, text_to_query, text_to_text = block(queries, length)
    seen = jnp.block([[jnp.ones((queries, queries)), query_to_text], [text_to_query, text_to_text]]).astype(bool)
    present = jnp.concatenate([jnp.ones((batch, queries), bool), text_mask.astype(bool)], axis=1)
    return seen[None, None] & present[:, None, None, :]


class SelfAttention(nn.Module):
    """BERT's self-attention with its residual and LayerNorm, over queries and text together."""

    config: QFormerConfig

    @nn.compact
    def __call__(self, x, mask, past: KeyValue | None, dropout_rows):
        c = self.config
        dense = lambda name: DenseGeneral(
            (c.heads, c.width // c.heads), kernel_init=_initializer, dtype=c.dtype, name=name
        )
        query, key, value = dense("query")(x), dense("key")(x), dense("value")(x)
        present = KeyValue(key, value)
        if past is not None:
            key = jnp.concatenate([past.key, key], axis=1)
            value = jnp.concatenate([past.value, value], axis=1)
        return _attend(self, query, key, value, mask, x, dropout_rows), present


class CrossAttention(nn.Module):
    """Queries read the image, whose keys and values are projected elsewhere, once for all passes.

    Several rows of queries in a row may share an image; as queries do not see each other here, they read it as one.
    """

    config: QFormerConfig

    @nn.compact
    def __call__(self, x, image: KeyValue, dropout_rows):
        c = self.config
        head = (c.heads, c.width // c.heads)
        query = DenseGeneral(head, kernel_init=_initializer, dtype=c.dtype, name="query")(x)
        return _attend(self, query, image.key, image.value, None, x, dropout_rows)


def _attend(module: nn.Module, query, key, value, mask, residual, dropout_rows) -> jax.Array:
    """Attention, output projection, dropout, residual and LayerNorm, as submodules of the calling module."""
    c = module.config
    shared = len(query) // len(key)
    # Only where rows share an image are the rows of `query` more than those of `key`: they stand side by side.
    together = query.reshape(len(key), shared * query.shape[1], *query.shape[2:])
    module.sow("intermediates", "weights", attention_weights(together, key, mask))  # Kept only for those who ask.
    rate = 0.0 if dropout_rows is None else c.attention_dropout
    dropout_key = module.make_rng("dropout") if rate else None
    # The weights of the rows that share an image are dropped by the number of the first of them.
    first = dropout_rows[::shared] if rate else None
    x = dot_product_attention(
        together, key, value, mask, dropout_rate=rate, dropout_key=dropout_key, dropout_rows=first
    ).reshape(query.shape)
    x = DenseGeneral(c.width, axis=(-2, -1), kernel_init=_initializer, dtype=c.dtype, name="output")(x)
    x = Dropout(c.dropout)(x, dropout_rows)
    return nn.LayerNorm(c.norm_epsilon, dtype=c.dtype, name="norm")(x + residual)


class FeedForward(nn.Module):
    """BERT's feed-forward network with its residual and LayerNorm."""

    config: QFormerConfig

    @nn.compact
    def __call__(self, x, dropout_rows):
        c = self.config
        h = jax.nn.gelu(
            Dense(c.mlp_width, kernel_init=_initializer, dtype=c.dtype, name="intermediate")(x), approximate=False
        )
        h = Dense(c.width, kernel_init=_initializer, dtype=c.dtype, name="output")(h)
        h = Dropout(c.dropout)(h, dropout_rows)
        return nn.LayerNorm(c.norm_epsilon, dtype=c.dtype, name="norm")(x + h)


class Layer(nn.Module):
    """One layer: shared self-attention, cross-attention of the queries where there is one, two feed-forwards."""

    config: QFormerConfig
    cross_attention: bool

    @nn.compact
    def __call__(self, hidden, mask, image: KeyValue | None, past: KeyValue | None, dropout_rows):
        queries, text = hidden
        parts = [part for part in hidden if part is not None]
        x = jnp.concatenate(parts, axis=1)
        x, present = SelfAttention(self.config, name="attention")(x, mask, past, dropout_rows)
        split = 0 if queries is None else queries.shape[1]
        if queries is not None:
            queries = x[:, :split]
            if self.cross_attention:
                queries = CrossAttention(self.config, name="cross_attention")(queries, image, dropout_rows)
            queries = FeedForward(self.config, name="query_mlp")(queries, dropout_rows)
        if text is not None:
            text = FeedForward(self.config, name="text_mlp")(x[:, split:], dropout_rows)
        keep = lambda x: None if x is None else rows_of(len(x)).keep(x)
        return (keep(queries), keep(text)), present


class LayerGroup(nn.Module):
    """`layers` consecutive layers, the first of which reads the image: what the scan repeats."""

    config: QFormerConfig
    layers: int

    @nn.compact
    def __call__(self, hidden, mask, image: KeyValue | None, past: tuple[KeyValue, ...] | None, dropout_rows):
        presents = []
        for index in range(self.layers):
            layer = Layer(self.config, cross_attention=index == 0, name=f"layer_{index}")
            layer_past = None if past is None else past[index]
            hidden, present = layer(hidden, mask, image, layer_past, dropout_rows)
            presents.append(present)
        return hidden, tuple(presents)


class QFormerCache(NamedTuple):
    """Self-attention keys and values of a pass, for text that continues it.

    Attributes:
      groups: for each layer of a group, a KeyValue with a leading axis over groups.
      tail: the same for the layers after the last whole group, without that axis; empty if there are none.
    """

    groups: tuple[KeyValue, ...]
    tail: tuple[KeyValue, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and slots."""
        return jax.tree.leaves(self)[0].shape[-4:-2]

    def with_room(self, tokens: int) -> QFormerCache:
        """The same with empty slots for so many more tokens behind what is there."""
        return jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(0, tokens), (0, 0), (0, 0)]), self)

    def write(self, present: QFormerCache, slot: jax.Array | int) -> QFormerCache:
        """The same with the keys and values of further tokens in the slots from `slot` on."""
        place = lambda slots, new: jax.lax.dynamic_update_slice_in_dim(slots, new, slot, axis=slots.ndim - 3)
        return jax.tree.map(place, self, present)


class Transformer(nn.Module):
    """All layers: a scan over groups of `cross_attention_every` layers, and what is left over."""

    config: QFormerConfig

    @nn.compact
    def __call__(self, hidden, mask, image: KeyValue | None, past: QFormerCache | None, dropout_rows):
        c = self.config
        group = nn.remat(LayerGroup, prevent_cse=False) if c.remat else LayerGroup
        groups, tail = c.scanned_groups, c.layers % c.cross_attention_every
        presents, tail_presents = (), ()
        if groups:
            scan = nn.scan(
                group,
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(nn.broadcast, 0, 0, nn.broadcast),
                length=groups,
                unroll=min(c.unroll, groups),
            )
            scanned_image = jax.tree.map(lambda x: x[:groups], image)
            stack = scan(c, c.cross_attention_every, name="groups")
            hidden, presents = stack(hidden, mask, scanned_image, None if past is None else past.groups, dropout_rows)
        if tail:
            tail_image = jax.tree.map(lambda x: x[groups], image)
            last = group(c, tail, name="tail")
            hidden, tail_presents = last(hidden, mask, tail_image, None if past is None else past.tail, dropout_rows)
        return hidden, QFormerCache(presents, tail_presents)


class ImageProjection(nn.Module):
    """Image tokens to the keys and values of every cross-attention layer C, in two matrix products."""

    config: QFormerConfig

    @nn.compact
    def __call__(self, image_embeds: jax.Array) -> KeyValue:
        c = self.config
        shape = (c.cross_attention_layers, c.heads, c.width // c.heads)

        def project(name: str) -> jax.Array:
            dense = DenseGeneral(shape, kernel_init=_initializer, dtype=c.dtype, name=name)  # [B, P, C, H, d]
            return rows_of(len(image_embeds)).keep(jnp.moveaxis(dense(image_embeds), 2, 0), axis=1)

        return KeyValue(project("key"), project("value"))


class LanguageHead(nn.Module):
    """BERT's masked-language head without the tied decoder matrix: what is multiplied by the word embeddings."""

    config: QFormerConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        c = self.config
        x = jax.nn.gelu(Dense(c.width, kernel_init=_initializer, dtype=c.dtype, name="dense")(x), approximate=False)
        x = nn.LayerNorm(c.norm_epsilon, dtype=c.dtype, name="norm")(x)
        return x, self.param("bias", nn.initializers.zeros, (c.vocab_size,), jnp.float32)


class QFormer(nn.Module):
    """The passes that the objectives are made of. Parameters exist for the passes that initialisation runs.

    Each takes `dropout_rows` uint32[B], the number of every row in the global batch: with them there is dropout, by the
    generator "dropout".
    """

    config: QFormerConfig

    def setup(self):
        c = self.config
        self.query_tokens = self.param("query_tokens", _initializer, (1, c.queries, c.width))
        self.word_embeddings = nn.Embed(c.vocab_size, c.width, embedding_init=_initializer)
        self.position_embeddings = nn.Embed(c.max_positions, c.width, embedding_init=_initializer)
        self.embeddings_norm = nn.LayerNorm(c.norm_epsilon, dtype=c.dtype)
        self.embeddings_dropout = Dropout(c.dropout)
        self.image_projection = ImageProjection(c)
        self.transformer = Transformer(c)
        self.lm_head = LanguageHead(c)

    def _embed_queries(self, batch: int, dropout_rows: jax.Array | None) -> jax.Array:
        x = jnp.broadcast_to(self.embeddings_norm(self.query_tokens), (batch, *self.query_tokens.shape[1:]))
        return self.embeddings_dropout(rows_of(batch).keep(x), dropout_rows)

    def _embed_text(self, text_ids: jax.Array, dropout_rows: jax.Array | None) -> jax.Array:
        length = text_ids.shape[1]
        if length > self.config.max_positions:
            raise ValueError(
                f"text of {length} tokens, but the Q-Former has {self.config.max_positions} positions: "
                "shorten the text (max_text_tokens) or start from a BERT with more positions"
            )
        x = self.word_embeddings(text_ids) + self.position_embeddings(jnp.arange(length))[None]
        return self.embeddings_dropout(self.embeddings_norm(rows_of(len(x)).keep(x)), dropout_rows)

    def project_image(self, image_embeds: jax.Array) -> KeyValue:
        """float[B, P, D_image] -> keys and values float[C, B, P, H, d], for every pass that sees this image."""
        return self.image_projection(image_embeds)

    def encode_queries(
        self, image: KeyValue, *, dropout_rows: jax.Array | None = None
    ) -> tuple[jax.Array, QFormerCache]:
        """The queries read the image alone: query_output float[B, Q, D], and the cache that ITG continues."""
        queries = self._embed_queries(image.key.shape[1], dropout_rows)
        (queries, _), cache = self.transformer((queries, None), None, image, None, dropout_rows)
        return queries, cache

    def encode_text(
        self, text_ids: jax.Array, text_mask: jax.Array, *, dropout_rows: jax.Array | None = None
    ) -> jax.Array:
        """Text alone, bidirectional: int[B, T], bool[B, T] -> float[B, T, D]."""
        text = self._embed_text(text_ids, dropout_rows)
        mask = text_mask.astype(bool)[:, None, None, :]
        (_, text), _ = self.transformer((None, text), mask, None, None, dropout_rows)
        return text

    def encode_pair(
        self, image: KeyValue, text_ids: jax.Array, text_mask: jax.Array, *, dropout_rows: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Queries and text see each other: query_output float[B, Q, D] and text_output float[B, T, D].

        There may be N texts an image, those of an image in a row: `image` then has B / N images.
        """
        queries = self._embed_queries(text_ids.shape[0], dropout_rows)
        text = self._embed_text(text_ids, dropout_rows)
        mask = attention_mask(AttentionPattern.BIDIRECTIONAL, self.config.queries, text_mask)
        hidden, _ = self.transformer((queries, text), mask, image, None, dropout_rows)
        return hidden

    def decode_text(
        self, cache: QFormerCache, text_ids: jax.Array, text_mask: jax.Array, *, dropout_rows: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Text that continues the queries' pass, causally.

        Returns:
          Features float[B, T, D], the tied decoder matrix float[V, D] and its bias float[V]: the logits of the next
          token are features @ matrix.T + bias, and it is for the loss to decide how much of that exists at once.
        """
        text = self._embed_text(text_ids, dropout_rows)
        mask = attention_mask(AttentionPattern.CAUSAL, self.config.queries, text_mask)[:, :, self.config.queries :]
        (_, text), _ = self.transformer((None, text), mask, None, cache, dropout_rows)
        features, bias = self.lm_head(text)
        return features, self.word_embeddings.embedding, bias

    def decode_tokens(
        self, cache: QFormerCache, token_ids: jax.Array, positions: jax.Array, seen: jax.Array, slot: jax.Array | int
    ) -> tuple[jax.Array, QFormerCache]:
        """Further tokens of such texts, of which the cache holds what stands before them.

        Args:
          cache: of the queries, `with_room` for the texts.
          token_ids: int[B, M], of one text a row or of several.
          positions: int[M], of these tokens in their texts, from 0.
          seen: bool[B or 1, 1, M, S], which slots of the cache each of them sees, its own and those of the others here
            among them.
          slot: they are written to the slots from this one on.

        Returns:
          The features of `decode_text`, float[B, M, D], and the cache with the tokens.
        """
        count = token_ids.shape[1]
        x = self.word_embeddings(token_ids) + self.position_embeddings(positions)[None]
        text = self.embeddings_norm(rows_of(len(x)).keep(x))
        # Attention finds these tokens behind the slots, not yet in them.
        own = slot + jnp.arange(count)
        these = jnp.take(seen, own, axis=-1)
        mask = jnp.concatenate([seen & ~jnp.isin(jnp.arange(cache.shape[1]), own), these], axis=-1)
        (_, text), present = self.transformer((None, text), mask, None, cache, None)
        return self.lm_head(text)[0], cache.write(present, slot)
