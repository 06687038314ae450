"""Frozen image encoders.

An encoder is a Flax module from float[B, S, S, 3], normalised with its own mean and deviation, to image_embeds
float[B, P, D]: a sequence of image tokens, be they the patches of a ViT or the cells of a feature map. What comes after
(ln_vision, positions, the Q-Former) is trained and does not care which.
"""

from __future__ import annotations

import dataclasses
import functools
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
      image_size: S, in pixels.
      image_mean, image_std: of the channels, for pixel values 0 to 255.
    """

    module: nn.Module
    width: int
    image_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    @functools.cached_property
    def tokens(self) -> int:
        """P."""
        image = jnp.zeros((1, self.image_size, self.image_size, 3))
        return jax.eval_shape(lambda key: self.module.init_with_output(key, image)[0], jax.random.key(0)).shape[1]

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters."""
        return self.module.init(key, jnp.zeros((1, self.image_size, self.image_size, 3)))["params"]

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


def is_ours(config: dict[str, Any]) -> bool:
    """Whether a config.json describes an encoder of our own format, as the nano recipe's."""
    return config.get("model_type") in _BUILDERS


def build(config: dict[str, Any], image_size: int, dtype: jnp.dtype = jnp.float32) -> VisionEncoder:
    """The encoder that a config.json of ours describes, for pictures of a size."""
    module, width = _BUILDERS[config["model_type"]](config, dtype)
    return VisionEncoder(module, width, image_size, tuple(config["image_mean"]), tuple(config["image_std"]))
