"""Frozen language models, and how a prompt and an answer become one row of tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Row(NamedTuple):
    """Prompts and answers, joined without a gap.

    Attributes:
      ids: int32[B, T].
      mask: bool[B, T], the tokens that are there.
      is_target: bool[B, T], those of the answer.
    """

    ids: jax.Array
    mask: jax.Array
    is_target: jax.Array


def join(
    prompt_ids: jax.Array, prompt_mask: jax.Array, target_ids: jax.Array, target_mask: jax.Array, length: int
) -> Row:
    """Put each row's target right behind its prompt, so that padding stands only at the end.

    Args:
      prompt_ids, prompt_mask: int32[B, Tp], bool[B, Tp], filled from the left.
      target_ids, target_mask: int32[B, Tt], bool[B, Tt], filled from the left.
      length: T; what does not fit is cut off.
    """
    prompt_length = prompt_mask.sum(1, keepdims=True)
    total = prompt_length + target_mask.sum(1, keepdims=True)
    place = jnp.arange(length)[None, :]
    is_target = (place >= prompt_length) & (place < total)
    take = lambda ids, at: jnp.take_along_axis(ids, jnp.clip(at, 0, ids.shape[1] - 1), axis=1)
    from_target = take(target_ids, place - prompt_length)
    ids = from_target if prompt_ids.shape[1] == 0 else jnp.where(is_target, from_target, take(prompt_ids, place))
    return Row(ids, place < total, is_target)
