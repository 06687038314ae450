"""The Llama family: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no dropout (arXiv 2302.13971).

Vicuna, SmolLM2 and Llama 3 are Llamas; Qwen 2.5 is one with biases on query, key and value.
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip2_jax.models.language.decoder import Decoder, DecoderConfig, update_cache
from blip2_jax.models.layers import Dense, DenseGeneral, KeyValue, RMSNorm, dot_product_attention


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary frequencies and how they are stretched beyond the length a model was trained on.

    Attributes:
      theta: base of the frequencies.
      kind: "default", "linear" (all frequencies divided by `factor`), "llama3" (only the slow ones), or "yarn" (arXiv
        2309.00071: the slow ones, with a ramp, and sharper attention).
      factor: of the stretch.
      original_positions: length it was trained on; llama3 and yarn.
      slow, fast: which frequencies count as slow or fast, in turns within that length: llama3's low_freq_factor and
        high_freq_factor, yarn's beta_slow and beta_fast.
      attention_factor: yarn's factor on cosine and sine.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    original_positions: int = 0
    slow: float = 1.0
    fast: float = 32.0
    attention_factor: float = 1.0

    def frequencies(self, half: int) -> np.ndarray:
        """Radians a position, float32[half]."""
        frequencies = self.theta ** (-np.arange(half) / half)
        if self.kind == "linear":
            frequencies = frequencies / self.factor
        elif self.kind == "llama3":
            turns = self.original_positions * frequencies / (2 * math.pi)
            kept = np.clip((turns - self.slow) / (self.fast - self.slow), 0, 1)
            frequencies = frequencies * (kept + (1 - kept) / self.factor)
        elif self.kind == "yarn":
            # The dimension that makes so many turns within the original length, and a ramp between the two.
            dimension = lambda turns: half * math.log(self.original_positions / (turns * 2 * math.pi), self.theta)
            low = max(math.floor(dimension(self.fast)), 0)
            high = min(math.ceil(dimension(self.slow)), 2 * half - 1)
            stretched = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0, 1)
            frequencies = frequencies * (1 - stretched + stretched / self.factor)
        elif self.kind != "default":
            raise ValueError(f"rotary scaling {self.kind!r} is unknown; expected default, linear, llama3 or yarn")
        return frequencies.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Attributes:
    rope: rotary frequencies (rope_theta, rope_scaling).
    qkv_bias: query, key and value have biases (Qwen 2.5).
    """

    rope: Rope = Rope()
    qkv_bias: bool = False


def rotate(x: jax.Array, positions: jax.Array, rope: Rope) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864), the two halves of a head turning against each other.

    Args:
      x: float[B, T, H, d].
      positions: int[B, T].
      rope: the frequencies.

    Returns:
      float[B, T, H, d], in the dtype of `x`.
    """
    half = x.shape[-1] // 2
    angles = positions[..., None, None].astype(jnp.float32) * rope.frequencies(half)
    cosine, sine = jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


class LlamaLayer(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x, cache: KeyValue | None, positions, mask, offset, _):
        c = self.config
        heads = lambda count, name: DenseGeneral((count, c.head_size), use_bias=c.qkv_bias, dtype=c.dtype, name=name)
        h = RMSNorm(c.norm_epsilon, c.dtype, name="attention_norm")(x)
        query = rotate(heads(c.heads, "query")(h), positions, c.rope)
        key = rotate(heads(c.kv_heads, "key")(h), positions, c.rope)
        seen, cache = update_cache(cache, key, heads(c.kv_heads, "value")(h), offset)
        h = dot_product_attention(query, seen.key, seen.value, mask)
        x = x + DenseGeneral(c.width, axis=(-2, -1), use_bias=False, dtype=c.dtype, name="output")(h)

        dense = lambda width, name: Dense(width, use_bias=False, dtype=c.dtype, name=name)
        h = RMSNorm(c.norm_epsilon, c.dtype, name="mlp_norm")(x)
        h = jax.nn.silu(dense(c.mlp_width, "gate")(h)) * dense(c.mlp_width, "up")(h)
        return x + dense(c.width, "down")(h), cache


class Llama(Decoder):
    """A decoder that accepts embeddings; see `Decoder`."""

    config: LlamaConfig

    def layer(self) -> type[nn.Module]:
        return LlamaLayer

    def last_norm(self) -> nn.Module:
        return RMSNorm(self.config.norm_epsilon, self.config.dtype)
