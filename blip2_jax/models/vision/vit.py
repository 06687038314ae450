"""Vision transformers: one module that is EVA-CLIP ViT-g, CLIP ViT-L or SigLIP by configuration.

They differ in what stands around the same pre-norm blocks: a class token or none, a norm before the blocks or behind
them, the activation, and how their position embeddings are interpolated.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from blip2_jax.models.layers import ACTIVATIONS, dot_product_attention
from blip2_jax.parallel.rows import rows_of


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes and variant.

    Attributes:
      image_size: S, side of a square picture in pixels; what is left beyond whole patches is not seen.
      patch: side of a patch in pixels.
      width: D.
      layers, heads, mlp_width: of the transformer.
      activation: name in `layers.ACTIVATIONS`.
      norm_epsilon: of every LayerNorm.
      class_token: a learned token stands before the patches.
      patch_bias: the patch embedding has a bias.
      pre_norm: a norm before the first block (CLIP).
      final_norm: a norm behind the last block (SigLIP; not where BLIP-2 uses EVA-CLIP and CLIP).
      dtype: of the matrix products; norms and softmax stay fp32.
      remat: recompute a block in the backward pass instead of keeping its activations.
      unroll: blocks that one step of the scan runs.
    """

    image_size: int = 224
    patch: int = 14
    width: int = 1408
    layers: int = 39
    heads: int = 16
    mlp_width: int = 6144
    activation: str = "gelu"
    norm_epsilon: float = 1e-6
    class_token: bool = True
    patch_bias: bool = True
    pre_norm: bool = False
    final_norm: bool = False
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    unroll: int = 1

    @property
    def tokens(self) -> int:
        """P, the patches and the class token."""
        return (self.image_size // self.patch) ** 2 + self.class_token


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream. As a scan's body it has no input per block."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x, _=None):
        c = self.config
        norm = lambda name: nn.LayerNorm(c.norm_epsilon, dtype=c.dtype, use_fast_variance=False, name=name)
        qkv = nn.DenseGeneral((3, c.heads, c.width // c.heads), dtype=c.dtype, name="qkv")(norm("attention_norm")(x))
        query, key, value = (qkv[:, :, index] for index in range(3))
        h = dot_product_attention(query, key, value)
        x = x + nn.DenseGeneral(c.width, axis=(-2, -1), dtype=c.dtype, name="output")(h)
        h = ACTIVATIONS[c.activation](nn.Dense(c.mlp_width, dtype=c.dtype, name="up")(norm("mlp_norm")(x)))
        return rows_of(len(x)).keep(x + nn.Dense(c.width, dtype=c.dtype, name="down")(h)), None


class ViT(nn.Module):
    """float[B, S, S, 3], normalised -> the residual stream behind the last block, float[B, P, D]."""

    config: ViTConfig

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        c = self.config
        if image.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(f"expected pictures of {c.image_size} x {c.image_size} x 3, found {image.shape[1:]}")
        patch = (c.patch, c.patch)
        embed = nn.Conv(c.width, patch, patch, "VALID", use_bias=c.patch_bias, dtype=c.dtype, name="patch_embedding")
        x = embed(image.astype(c.dtype)).reshape(len(image), -1, c.width)
        normal = nn.initializers.normal(0.02)
        if c.class_token:
            token = self.param("class_token", normal, (c.width,))
            x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, c.width)).astype(c.dtype), x], axis=1)
        x = x + self.param("positions", normal, (c.tokens, c.width)).astype(c.dtype)
        if c.pre_norm:
            x = nn.LayerNorm(c.norm_epsilon, dtype=c.dtype, use_fast_variance=False, name="pre_norm")(x)
        blocks = nn.scan(
            nn.remat(Block, prevent_cse=False) if c.remat else Block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=c.layers,
            unroll=c.unroll,
        )(c, name="blocks")
        x, _ = blocks(x, None)
        if c.final_norm:
            x = nn.LayerNorm(c.norm_epsilon, dtype=c.dtype, use_fast_variance=False, name="final_norm")(x)
        return x


def cubic_matrix(inputs: int, outputs: int, align_corners: bool) -> np.ndarray:
    """float64[outputs, inputs]: cubic interpolation of a line of points as PyTorch's `interpolate(mode="bicubic")`.

    That is Keys' kernel with a = -0.75, points beyond the ends repeated, no antialiasing; `jax.image.resize` has
    a = -0.5 and antialiasing.
    """
    a = -0.75
    at = np.arange(outputs)
    if align_corners:
        source = at * ((inputs - 1) / (outputs - 1) if outputs > 1 else 0.0)
    else:
        source = (at + 0.5) * (inputs / outputs) - 0.5
    first = np.floor(source).astype(int)
    matrix = np.zeros((outputs, inputs))
    for tap in range(-1, 3):
        distance = np.abs(source - first - tap)
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        np.add.at(matrix, (at, np.clip(first + tap, 0, inputs - 1)), np.where(distance <= 1, near, far))
    return matrix


def resize_positions(positions: np.ndarray, image_size: int, config: ViTConfig, align_corners: bool) -> np.ndarray:
    """Interpolate a position embedding bicubically to the pictures of `config`; the class token's stays as it is.

    Args:
      positions: float[P', D] for square pictures of `image_size` pixels.
      image_size: the side that the embedding was made for.
      config: says the new side, and whether there is a class token.
      align_corners: whether the outermost patches of both sizes coincide (CLIP in LAVIS), or the pictures' borders do.

    Returns:
      float[P, D], of the dtype of `positions`.

    Raises:
      ValueError: the embedding does not have the patches of a picture of `image_size`.
    """
    old, new = image_size // config.patch, config.image_size // config.patch
    extra = int(config.class_token)
    if len(positions) != old * old + extra:
        raise ValueError(
            f"a position embedding of {len(positions)} tokens, expected {old} x {old} patches and {extra} class tokens"
        )
    if old == new:
        return positions
    matrix = cubic_matrix(old, new, align_corners)
    grid = positions[extra:].astype(np.float64).reshape(old, old, -1)
    grid = np.einsum("ai,bj,ijd->abd", matrix, matrix, grid, optimize=True).reshape(new * new, -1)
    return np.concatenate([positions[:extra], grid.astype(positions.dtype)])
