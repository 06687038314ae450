"""A model in the middle of a text: what it makes of the tokens that are written behind a prefix.

Several texts of a row share its prefix, and stand side by side like the tokens of one text: each has slots of the cache
behind the prefix, and a mask says which slots belong to the text that a token continues.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from blip2_jax.models.blip2 import ImageTextModel
from blip2_jax.models.language import decoder as decoders
from blip2_jax.models.language import t5
from blip2_jax.models.qformer import QFormerCache
from blip2_jax.parallel.rows import rows_of


class Writer(NamedTuple):
    """Attributes:
    first: float[B, D], what the model makes of the prefix.
    state: what it has to remember.
    read: (state, tokens int32[B, M], which of the slots they take, the first of M in a row; bool[B or 1, M, R], which
        slots each of them sees, itself among them) -> float[B, M, D], what the model makes of them, and the new state.
    logits: float[..., D] -> float32[..., V], of the token that comes next.
    """

    first: jax.Array
    state: Any
    read: Callable[[Any, jax.Array, jax.Array | int, jax.Array], tuple[jax.Array, Any]]
    logits: Callable[[jax.Array], jax.Array]


def _divided(cache: Any, batch: int) -> Any:
    """A cache of float[..., B, S, H, d] with its rows where the batch has them."""
    return jax.tree.map(lambda x: rows_of(batch).keep(x, axis=x.ndim - 4), cache)


def _behind(prefix: jax.Array, seen: jax.Array) -> jax.Array:
    """bool[B, S], the slots of a prefix, and bool[B or 1, M, R] of those behind it: bool[B, 1, M, S + R]."""
    shape = (len(prefix), *seen.shape[1:])
    prefix = jnp.broadcast_to(prefix[:, None], (*shape[:2], prefix.shape[1]))
    return jnp.concatenate([prefix, jnp.broadcast_to(seen, shape)], axis=-1)[:, None]


def _of_slots(places: jax.Array, tokens: jax.Array, slot: jax.Array | int) -> jax.Array:
    """int[M]: of int[R] those of the slots that tokens int32[B, M] take."""
    return jax.lax.dynamic_slice_in_dim(places, slot, tokens.shape[1])


def decoder(
    model: decoders.Decoder, parameters: dict, prefix_embeds: jax.Array, prefix_mask: jax.Array, places: jax.Array
) -> Writer:
    """A decoder language model behind a prefix.

    Args:
      model: the language model.
      parameters: its parameters.
      prefix_embeds: float[B, T, D].
      prefix_mask: bool[B, T], what is there of it; rows may have gaps.
      places: int[R], the place in its text, from 0, of the token that each slot is for.
    """
    batch, length, _ = prefix_embeds.shape
    apply = lambda *args, **kwargs: model.apply({"params": parameters}, *args, **kwargs)
    head, present = apply(method="head"), prefix_mask.astype(bool)
    positions = jnp.maximum(jnp.cumsum(present, axis=1) - 1, 0)

    # Slot order is time order: a token of the prefix sees the present slots up to its own.
    order = jnp.arange(length + len(places))[None, :] <= jnp.arange(length)[:, None]
    filled = jnp.pad(present, ((0, 0), (0, len(places))))
    cache = _divided(decoders.empty_cache(model.config, batch, length + len(places)), batch)
    hidden, cache = apply(prefix_embeds, positions, (order[None] & filled[:, None])[:, None], cache, 0)
    last = length - 1 - jnp.argmax(present[:, ::-1], axis=1)
    first = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]

    apart, cache = _apart(parameters["layers"], cache)

    def read(cache, tokens, slot, seen):
        position = present.sum(1, keepdims=True) + _of_slots(places, tokens, slot)
        embeds = apply(tokens, method="embed")
        return apply(embeds, position, _behind(present, seen), cache, length + slot, apart=apart)

    return Writer(first, cache, read, lambda hidden: _logits(hidden, head))


def encoder_decoder(
    model: t5.T5, parameters: dict, inputs_embeds: jax.Array, mask: jax.Array, places: jax.Array
) -> Writer:
    """An encoder-decoder whose encoder has read the prefix; arguments as `decoder`."""
    batch = len(inputs_embeds)
    apply = lambda *args, **kwargs: model.apply({"params": parameters}, *args, **kwargs)
    head, encoded = apply(method="head"), apply(inputs_embeds, mask, method="encode")
    # Before the text stands the start token, of which all texts of a row have one.
    before, all_places = jnp.ones((batch, 1), bool), jnp.append(0, places + 1)

    cache = _divided(t5.empty_cache(model.config, batch, len(all_places)), batch)
    apart, cache = _apart((parameters["decoder"], encoded.layers), cache)

    def decode(cache, tokens, looking, seen, slot):
        sight = t5.Sight(looking, all_places, seen)
        return apply(encoded, apply(tokens, method="embed"), cache, slot, sight=sight, apart=apart, method="decode")

    def read(cache, tokens, slot, seen):
        return decode(cache, tokens, _of_slots(places, tokens, slot) + 1, _behind(before, seen), slot + 1)

    start = jnp.full((batch, 1), t5.START, jnp.int32)
    hidden, cache = decode(cache, start, jnp.zeros(1, int), (jnp.arange(len(all_places)) == 0)[None, None, None], 0)
    return Writer(hidden[:, 0], cache, read, lambda hidden: _logits(hidden, head))


def qformer(
    model: ImageTextModel, parameters: dict, cache: QFormerCache, start_token: int, places: jax.Array
) -> Writer:
    """The Q-Former of stage 1, whose queries have read B images.

    Args:
      model: of stage 1.
      parameters: its parameters.
      cache: of `ImageTextModel.image_features`.
      start_token: stands before every text.
      places: as of `decoder`.
    """
    apply = lambda *args: model.apply({"params": parameters}, *args, method="next_features")
    batch, queries = cache.shape
    own = parameters["qformer"]
    matrix, bias = own["word_embeddings"]["embedding"], own["lm_head"]["bias"]
    # Before the text stand the queries and the start token.
    before = jnp.ones((batch, queries + 1), bool)

    def read(cache, tokens, slot, seen):
        positions = _of_slots(places, tokens, slot) + 1
        return apply(cache, tokens, positions, _behind(before, seen), queries + 1 + slot)

    cache = _divided(cache.with_room(1 + len(places)), batch)
    start, seen = (
        jnp.full((batch, 1), start_token, jnp.int32),
        (jnp.arange(cache.shape[1]) <= queries)[None, None, None],
    )
    hidden, cache = apply(cache, start, jnp.zeros(1, int), seen, queries)
    return Writer(hidden[:, 0], cache, read, lambda hidden: _logits(hidden, matrix) + bias)


def _apart(stacked: Any, cache: Any) -> tuple[tuple | None, Any]:
    """Layers one by one, with a cache each, on CPUs; there a scan would copy all weights and caches for every token.

    Elsewhere everything stays stacked: a copy of a large model's weights would not fit.
    """
    if jax.default_backend() != "cpu":
        return None, cache
    return decoders.one_by_one(stacked), decoders.one_by_one(cache)


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """float[..., D], float[V, D] -> float32[..., V]."""
    return jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)


def writer_of(
    model: decoders.Decoder | t5.T5, parameters: dict, prefix_embeds: jax.Array, prefix_mask: jax.Array, places
) -> Writer:
    """`decoder` or `encoder_decoder`, as the language model is."""
    start = encoder_decoder if isinstance(model, t5.T5) else decoder
    return start(model, parameters, prefix_embeds, prefix_mask, places)
