"""Generation under jit: one loop for every model that writes, with key-value caches of static size."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from blip2_jax.models.blip2 import ImageTextModel
from blip2_jax.models.language.decoder import Decoder, empty_cache
from blip2_jax.models.qformer import QFormerCache


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How a text is written.

    Attributes:
      max_new_tokens: N, at most, the end included.
      min_new_tokens: at least, before the end.
      temperature: divisor of the logits of tokens that are drawn; 0: always the likeliest token (greedy).
      top_p: tokens are drawn from the fewest likeliest ones that have this share of the probability (nucleus sampling,
        arXiv 1904.09751); 1: from all.
      top_k: before that, from so many likeliest tokens; 0: from all.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        expected = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
        }
        for name, (holds, what) in expected.items():
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)}: expected {what}")


class Draws(NamedTuple):
    """What decides the random choices: a row's text is a function of the key and of the row's own number.

    Attributes:
      key: of this run.
      rows: uint32[B].
    """

    key: jax.Array
    rows: jax.Array


# (state, token int32[B], its place in the text) -> float32[B, V], the logits of the next one, and the new state.
Step = Callable[[Any, jax.Array, jax.Array | int], tuple[jax.Array, Any]]


def generate(
    model: Decoder,
    parameters: dict,
    prefix_embeds: jax.Array,
    prefix_mask: jax.Array,
    config: GenerationConfig,
    end_token: int,
    draws: Draws | None = None,
) -> jax.Array:
    """What a language model writes behind a prefix, until every row has ended.

    Args:
      model: the language model.
      parameters: its parameters.
      prefix_embeds: float[B, T, D], soft prompt and prompt.
      prefix_mask: bool[B, T]; rows may have gaps, so prompts of any lengths share a batch and
        give what each gives alone.
      config: how.
      end_token: ends a row; what follows it in the row is the same token.
      draws: needed unless the temperature is 0.

    Returns:
      int32[B, N].
    """
    batch, length, _ = prefix_embeds.shape
    slots = jnp.arange(length + config.max_new_tokens)
    filled = jnp.pad(prefix_mask.astype(bool), ((0, 0), (0, config.max_new_tokens)))
    positions = jnp.maximum(jnp.cumsum(prefix_mask, axis=1) - 1, 0)
    apply = lambda *args, **kwargs: model.apply({"params": parameters}, *args, **kwargs)
    head = apply(method="head")
    logits = lambda hidden: jnp.einsum("bd,vd->bv", hidden, head, preferred_element_type=jnp.float32)

    # Slot order is time order: a token sees the present slots up to its own.
    order = slots[None, :] <= jnp.arange(length)[:, None]
    cache = empty_cache(model.config, batch, len(slots))
    hidden, cache = apply(prefix_embeds, positions, (order[None] & filled[:, None])[:, None], cache, 0)
    last = length - 1 - jnp.argmax(prefix_mask[:, ::-1], axis=1)
    first = logits(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])

    def step(cache, token, place):
        seen = filled | ((slots >= length) & (slots <= length + place))
        position = prefix_mask.sum(1) + place
        embeds = apply(token[:, None], method="embed")
        hidden, cache = apply(embeds, position[:, None], seen[:, None, None, :], cache, length + place)
        return logits(hidden[:, 0]), cache

    return _write(step, first, cache, config, end_token, draws)


def caption(
    model: ImageTextModel,
    parameters: dict,
    cache: QFormerCache,
    config: GenerationConfig,
    start_token: int,
    end_token: int,
    draws: Draws | None = None,
) -> jax.Array:
    """What the Q-Former itself writes about images that its queries have read, as image-grounded generation taught it.

    Args:
      model: of stage 1.
      parameters: its parameters.
      cache: of `ImageTextModel.image_features`, B rows.
      config: how.
      start_token: stands before every text, [DEC].
      end_token: ends a row; what follows it in the row is the same token.
      draws: needed unless the temperature is 0.

    Returns:
      int32[B, N].

    Raises:
      ValueError: the Q-Former has fewer positions than N.
    """
    positions = model.config.qformer.max_positions
    if config.max_new_tokens > positions:
        raise ValueError(f"max_new_tokens = {config.max_new_tokens}, but the Q-Former has {positions} positions")
    apply = lambda *args, **kwargs: model.apply({"params": parameters}, *args, **kwargs)

    def step(cache, token, place):
        features, matrix, bias, cache = apply(cache, token, place + 1, method="next_features")
        return jnp.einsum("bd,vd->bv", features, matrix, preferred_element_type=jnp.float32) + bias, cache

    start = jnp.full(cache.shape[0], start_token, jnp.int32)
    first, cache = step(cache.with_room(config.max_new_tokens), start, -1)
    return _write(step, first, cache, config, end_token, draws)


def _write(
    step: Step, logits: jax.Array, state: Any, config: GenerationConfig, end_token: int, draws: Draws | None
) -> jax.Array:
    """The loop: from the logits of the first token, float32[B, V], to int32[B, N]."""
    if config.temperature and draws is None:
        raise ValueError(f"temperature = {config.temperature} draws tokens: expected `draws`, found none")

    def choose(logits: jax.Array, place: jax.Array | int, ended: jax.Array) -> jax.Array:
        is_end = jnp.arange(logits.shape[1]) == end_token
        logits = jnp.where(is_end & (place < config.min_new_tokens), -jnp.inf, logits)
        token = _draw(logits, config, draws, place) if config.temperature else jnp.argmax(logits, axis=-1)
        return jnp.where(ended, end_token, token).astype(jnp.int32)

    def body(carry):
        place, token, ended, state, tokens = carry
        logits, state = step(state, token, place - 1)
        token = choose(logits, place, ended)
        return place + 1, token, ended | (token == end_token), state, tokens.at[:, place].set(token)

    batch = len(logits)
    token = choose(logits, 0, jnp.zeros(batch, bool))
    tokens = jnp.full((batch, config.max_new_tokens), end_token, jnp.int32).at[:, 0].set(token)
    condition = lambda carry: (carry[0] < config.max_new_tokens) & ~carry[2].all()
    return jax.lax.while_loop(condition, body, (1, token, token == end_token, state, tokens))[-1]


def _draw(logits: jax.Array, config: GenerationConfig, draws: Draws, place: jax.Array | int) -> jax.Array:
    """int32[B]: a token of each row, drawn by its key and number and by the place in the text."""
    logits = logits / config.temperature
    if config.top_k:
        kept = likeliest(jax.nn.softmax(logits), jnp.ones_like(logits), config.top_k)
        logits = jnp.where(kept, logits, -jnp.inf)
    if config.top_p < 1:
        probabilities = jax.nn.softmax(logits)
        logits = jnp.where(likeliest(probabilities, probabilities, config.top_p), logits, -jnp.inf)
    key = jax.random.fold_in(draws.key, place)
    return jax.vmap(lambda row, logits: jax.random.categorical(jax.random.fold_in(key, row), logits))(
        draws.rows, logits
    )


def likeliest(probabilities: jax.Array, weights: jax.Array, amount: float) -> jax.Array:
    """The fewest likeliest tokens of each row whose weights sum to `amount`; those equally likely belong together.

    What is not negative is ordered as its bits are, so the least probability that belongs to them is found bit by bit,
    in 31 sums over the vocabulary. Sorting it took ten times as long.

    Args:
      probabilities, weights: float32[B, V].
      amount: if there is not as much in all, every token is among them.

    Returns:
      bool[B, V].
    """
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def narrow(number: jax.Array, least: jax.Array) -> jax.Array:
        higher = least | (1 << (30 - number))
        enough = jnp.where(bits >= higher, weights, 0).sum(-1, keepdims=True) >= amount
        return jnp.where(enough, higher, least)

    return bits >= jax.lax.fori_loop(0, 31, narrow, jnp.zeros((len(bits), 1), jnp.int32))
