"""The trainable part of BLIP-2 in its two stages; the frozen encoder and language model stand outside.

image --[frozen vision]--> image_embeds --> ln_vision --> Q-Former --+--> ITC, ITM, ITG            (stage 1)
                                                                     +--> projection --> [frozen LLM] (stage 2)
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip2_jax.models.layers import Dense, KeyValue
from blip2_jax.models.qformer import QFormer, QFormerCache, QFormerConfig


@dataclasses.dataclass(frozen=True)
class Blip2Config:
    """What both stages share.

    Attributes:
      qformer: sizes of the Q-Former.
      image_tokens: P, needed only for `image_positions`.
      image_positions: learn a position embedding for the image tokens. For convolutional encoders, whose tokens do not
        say where they are; a ViT has its own.
      embed_width: E, of the space where images and captions are compared.
      text_pooling: "cls" (the paper) or "mean", for text encoders trained that way.
      initial_temperature: divisor of the cosines.
      ln_vision_epsilon: 1e-5 in the original; 1e-6 in transformers' files, which take that of the ViT.
    """

    qformer: QFormerConfig
    image_tokens: int = 0
    image_positions: bool = False
    embed_width: int = 256
    text_pooling: str = "cls"
    initial_temperature: float = 0.07
    ln_vision_epsilon: float = 1e-5


class ImageTokens(nn.Module):
    """ln_vision, always fp32 and always trained, and the optional positions."""

    config: Blip2Config

    @nn.compact
    def __call__(self, image_embeds: jax.Array) -> jax.Array:
        x = nn.LayerNorm(self.config.ln_vision_epsilon, dtype=jnp.float32, name="norm")(image_embeds)
        if self.config.image_positions:
            shape = (self.config.image_tokens, image_embeds.shape[-1])
            x = x + self.param("positions", nn.initializers.normal(0.02), shape)
        return x.astype(self.config.qformer.dtype)


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class ImageFeatures(NamedTuple):
    """What the queries make of an image.

    Attributes:
      features: float32[B, Q, E] of unit length, to be compared with captions.
      query_output: float[B, Q, D].
      cache: for `ImageTextModel.caption_features`.
    """

    features: jax.Array
    query_output: jax.Array
    cache: QFormerCache


class ImageTextModel(nn.Module):
    """Stage 1: the Q-Former with the heads of its three objectives; see `QFormer` for the passes and `dropout_rows`."""

    config: Blip2Config

    def setup(self):
        c = self.config
        dense = lambda width: Dense(width, dtype=c.qformer.dtype)
        self.ln_vision = ImageTokens(c)
        self.qformer = QFormer(c.qformer)
        self.vision_proj = dense(c.embed_width)
        self.text_proj = dense(c.embed_width)
        self.itm_head = dense(2)
        self.temperature = self.param("temperature", nn.initializers.constant(c.initial_temperature), ())

    def project_image(self, image_embeds: jax.Array) -> KeyValue:
        """float[B, P, D_image], raw from the encoder -> what the passes below take as `image`."""
        return self.qformer.project_image(self.ln_vision(image_embeds))

    def image_features(self, image: KeyValue, *, dropout_rows: jax.Array | None = None) -> ImageFeatures:
        """The queries read the image alone."""
        query_output, cache = self.qformer.encode_queries(image, dropout_rows=dropout_rows)
        return ImageFeatures(_unit(self.vision_proj(query_output)), query_output, cache)

    def text_features(
        self, text_ids: jax.Array, text_mask: jax.Array, *, dropout_rows: jax.Array | None = None
    ) -> jax.Array:
        """int[B, T], bool[B, T] -> float32[B, E] of unit length."""
        text = self.qformer.encode_text(text_ids, text_mask, dropout_rows=dropout_rows)
        if self.config.text_pooling == "mean":
            weight = text_mask.astype(text.dtype)[..., None]
            pooled = (text * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
        else:
            pooled = text[:, 0]
        return _unit(self.text_proj(pooled))

    def match(
        self, image: KeyValue, text_ids: jax.Array, text_mask: jax.Array, *, dropout_rows: jax.Array | None = None
    ) -> jax.Array:
        """Logits of {no match, match}, averaged over the queries: float32[B, 2]; N texts an image as `encode_pair`."""
        query_output, _ = self.qformer.encode_pair(image, text_ids, text_mask, dropout_rows=dropout_rows)
        return self.itm_head(query_output).astype(jnp.float32).mean(1)

    def caption_features(self, cache: QFormerCache, text_ids, text_mask, *, dropout_rows: jax.Array | None = None):
        """Image-grounded generation; see `QFormer.decode_text`."""
        return self.qformer.decode_text(cache, text_ids, text_mask, dropout_rows=dropout_rows)

    def next_features(self, cache: QFormerCache, token_ids, positions, seen, slot):
        """The same, some tokens at a time; see `QFormer.decode_tokens`."""
        return self.qformer.decode_tokens(cache, token_ids, positions, seen, slot)


class SoftPromptModel(nn.Module):
    """Stage 2: queries read the image and speak to the language model in its own embedding space."""

    config: Blip2Config
    language_width: int

    @nn.compact
    def __call__(
        self,
        image_embeds: jax.Array,
        instruction_ids: jax.Array | None = None,
        instruction_mask: jax.Array | None = None,
        *,
        dropout_rows: jax.Array | None = None,
    ) -> jax.Array:
        """float[B, P, D_image] -> soft prompt float[B, Q, D_language].

        With an instruction int[B, T], bool[B, T] queries and instruction see each other (InstructBLIP, arXiv
        2305.06500), so that what the queries read depends on the task.
        """
        c = self.config
        qformer = QFormer(c.qformer, name="qformer")
        image = qformer.project_image(ImageTokens(c, name="ln_vision")(image_embeds))
        if instruction_ids is None:
            query_output, _ = qformer.encode_queries(image, dropout_rows=dropout_rows)
        else:
            query_output, _ = qformer.encode_pair(image, instruction_ids, instruction_mask, dropout_rows=dropout_rows)
        return Dense(self.language_width, dtype=c.qformer.dtype, name="language_projection")(query_output)
