"""Where a batch's image tokens come from."""

from __future__ import annotations

from collections.abc import Callable

import jax

from blip2_jax import params
from blip2_jax.data.pipeline import Batch

Encode = Callable[[params.Tree, jax.Array], jax.Array]


def image_embeds(encode: Encode, trainable: params.Tree, frozen: params.Tree, batch: Batch) -> jax.Array:
    """float[B, P, D] raw from the encoder: computed before, or by running it.

    Args:
      encode: (parameters of the encoder, the batch's image) -> float[B, P, D].
      trainable, frozen: the encoder's parameters stand in one of them as "vision"; only in `trainable` they, and what
        they compute, have a gradient.
      batch: with `image_embeds`, or `image`.
    """
    if "image_embeds" in batch:
        return batch["image_embeds"]
    if "vision" in trainable:
        return encode(trainable["vision"], batch["image"])
    return jax.lax.stop_gradient(encode(frozen["vision"], batch["image"]))
