"""OPT (arXiv 2205.01068): learned positions, pre-norm layers with biases, ReLU."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax

from blip2_jax.models.language.decoder import Decoder, DecoderConfig, update_cache
from blip2_jax.models.layers import ACTIVATIONS, Dense, DenseGeneral, Dropout, KeyValue, dot_product_attention

# The first rows of OPT's position table belong to nothing: position 0 has row 2.
_OFFSET = 2


@dataclasses.dataclass(frozen=True)
class OPTConfig(DecoderConfig):
    """Attributes:
    max_positions: longest text in tokens (max_position_embeddings).
    activation: of the MLP (activation_function).
    dropout: share dropped of what a layer's attention and its MLP add, where rows are given for it (dropout).
    attention_dropout: share of the attention weights (attention_dropout); none in the published models.
    """

    max_positions: int = 2048
    activation: str = "relu"
    dropout: float = 0.0
    attention_dropout: float = 0.0


class OPTLayer(nn.Module):
    config: OPTConfig

    @nn.compact
    def __call__(self, x, cache: KeyValue | None, positions, mask, offset, dropout_rows):
        c = self.config
        norm = lambda name: nn.LayerNorm(c.norm_epsilon, dtype=c.dtype, use_fast_variance=False, name=name)
        heads = lambda name: DenseGeneral((c.heads, c.head_size), dtype=c.dtype, name=name)
        h = norm("attention_norm")(x)
        query, key, value = heads("query")(h), heads("key")(h), heads("value")(h)
        seen, cache = update_cache(cache, key, value, offset)
        h = dot_product_attention(
            query,
            seen.key,
            seen.value,
            mask,
            dropout_rate=c.attention_dropout,
            dropout_key=None if dropout_rows is None else self.make_rng("dropout"),
            dropout_rows=dropout_rows,
        )
        h = DenseGeneral(c.width, axis=(-2, -1), dtype=c.dtype, name="output")(h)
        x = x + Dropout(c.dropout)(h, dropout_rows)
        h = ACTIVATIONS[c.activation](Dense(c.mlp_width, dtype=c.dtype, name="up")(norm("mlp_norm")(x)))
        h = Dense(c.width, dtype=c.dtype, name="down")(h)
        return x + Dropout(c.dropout)(h, dropout_rows), cache


class OPT(Decoder):
    """A decoder that accepts embeddings; see `Decoder`."""

    config: OPTConfig

    def setup(self):
        super().setup()
        c = self.config
        self.position_embeddings = nn.Embed(c.max_positions + _OFFSET, c.width, dtype=c.dtype)

    def layer(self) -> type[nn.Module]:
        return OPTLayer

    def last_norm(self) -> nn.Module:
        return nn.LayerNorm(self.config.norm_epsilon, dtype=self.config.dtype, use_fast_variance=False)

    def place(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return x + self.position_embeddings(positions + _OFFSET)
