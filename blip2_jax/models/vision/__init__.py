"""Frozen image encoders.

An encoder is a Flax module from float[B, S, S, 3], normalised with its own mean and deviation, to image_embeds
float[B, P, D]: a sequence of image tokens, be they the patches of a ViT or the cells of a feature map. What comes after
(ln_vision, positions, the Q-Former) is trained and does not care which.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip2_jax.models.vision.efficientnet_lite import EfficientNetLite, Stage


@dataclasses.dataclass(frozen=True)
class VisionEncoder:
    """A module with what it needs to know about pictures.

    Attributes:
      module: float[B, S, S, 3] -> float[B, P, D].
      width: D.
      image_mean, image_std: of the channels, for pixel values 0 to 255.
    """

    module: nn.Module
    width: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def tokens(self, image_size: int) -> int:
        """P at a side of `image_size` pixels."""
        return jax.eval_shape(lambda key: self.init(key, image_size), jax.random.key(0))[0].shape[1]

    def init(self, key: jax.Array, image_size: int) -> tuple[jax.Array, Any]:
        """Image tokens of an empty picture, and fresh parameters."""
        return self.module.init_with_output(key, jnp.zeros((1, image_size, image_size, 3)))

    def encode(self, params: Any, image: jax.Array) -> jax.Array:
        """uint8[B, S, S, 3] -> image_embeds float[B, P, D]; normalisation happens here, on the device."""
        mean, std = jnp.asarray(self.image_mean), jnp.asarray(self.image_std)
        return self.module.apply({"params": params}, (image.astype(jnp.float32) - mean) / std)


def _efficientnet_lite(config: dict[str, Any], dtype: jnp.dtype) -> tuple[nn.Module, int]:
    stages = tuple(Stage(*stage) for stage in config["stages"])
    return EfficientNetLite(stages, config["stem_width"], dtype), stages[-1].width


_BUILDERS: dict[str, Callable[[dict[str, Any], jnp.dtype], tuple[nn.Module, int]]] = {
    "efficientnet_lite": _efficientnet_lite,
}


def build(config: dict[str, Any], dtype: jnp.dtype = jnp.float32) -> VisionEncoder:
    """The encoder that a config.json of ours describes.

    Raises:
      ValueError: its model_type is unknown.
    """
    kind = config.get("model_type")
    if kind not in _BUILDERS:
        raise ValueError(f"vision model_type {kind!r} is unknown; expected one of {', '.join(_BUILDERS)}")
    module, width = _BUILDERS[kind](config, dtype)
    return VisionEncoder(module, width, tuple(config["image_mean"]), tuple(config["image_std"]))
