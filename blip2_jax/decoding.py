"""Generation under jit: one loop with a static key-value cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from blip2_jax.models.language.decoder import Decoder, empty_cache


def greedy(
    model: Decoder,
    parameters: dict,
    prefix_embeds: jax.Array,
    prefix_mask: jax.Array,
    *,
    max_new_tokens: int,
    end_token: int,
) -> jax.Array:
    """The likeliest token after another, until every row has ended.

    Args:
      model: the language model.
      parameters: its parameters.
      prefix_embeds: float[B, T, D], soft prompt and prompt.
      prefix_mask: bool[B, T]; rows may have gaps, so prompts of any lengths share a batch and
        give what each gives alone.
      max_new_tokens: N.
      end_token: ends a row; what follows it in the row is the same token.

    Returns:
      int32[B, N].
    """
    batch, length, _ = prefix_embeds.shape
    slots = length + max_new_tokens
    filled = jnp.pad(prefix_mask.astype(bool), ((0, 0), (0, max_new_tokens)))
    positions = jnp.maximum(jnp.cumsum(prefix_mask, axis=1) - 1, 0)
    cache = empty_cache(model.config, batch, slots)
    apply = lambda *args, **kwargs: model.apply({"params": parameters}, *args, **kwargs)

    # Slot order is time order: a token sees the present slots up to its own.
    order = jnp.arange(slots)[None, :] <= jnp.arange(length)[:, None]
    hidden, cache = apply(prefix_embeds, positions, (order[None] & filled[:, None])[:, None], cache, 0)
    last = length - 1 - jnp.argmax(prefix_mask[:, ::-1], axis=1)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    head = apply(method="head")

    def choose(hidden: jax.Array, ended: jax.Array) -> jax.Array:
        logits = jnp.einsum("bd,vd->bv", hidden, head, preferred_element_type=jnp.float32)
        return jnp.where(ended, end_token, jnp.argmax(logits, axis=-1)).astype(jnp.int32)

    def step(carry):
        index, token, position, ended, filled, cache, tokens = carry
        tokens = tokens.at[:, index].set(token)
        ended = ended | (token == end_token)
        filled = filled.at[:, length + index].set(True)
        embeds = apply(token[:, None], method="embed")
        hidden, cache = apply(embeds, position[:, None], filled[:, None, None, :], cache, length + index)
        return index + 1, choose(hidden[:, 0], ended), position + 1, ended, filled, cache, tokens

    ended = jnp.zeros(batch, bool)
    start = (
        0,
        choose(hidden, ended),
        prefix_mask.sum(1),
        ended,
        filled,
        cache,
        jnp.full((batch, max_new_tokens), end_token, jnp.int32),
    )
    condition = lambda carry: (carry[0] < max_new_tokens) & ~carry[3].all()
    return jax.lax.while_loop(condition, step, start)[-1]
