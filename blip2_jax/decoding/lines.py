"""The loop: K lines of every row are continued, token by token, until all have ended."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from blip2_jax.decoding.settings import GenerationConfig, Written
from blip2_jax.decoding.writers import Writer


class Lines(NamedTuple):
    """What is written so far.

    Attributes:
      tokens: int32[B, K, N]; what is not written yet holds the end token.
      path: int32[B, K, N], the line that wrote each of these tokens, which another line may have continued.
    """

    tokens: jax.Array
    path: jax.Array

    def extended(self, parents: jax.Array, tokens: jax.Array, place: jax.Array | int) -> Lines:
        """Each line continues a parent int[B, K], itself or another, with a token int32[B, K] at `place`."""
        inherit = lambda x: jnp.take_along_axis(x, parents[..., None], axis=1)
        own = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        return Lines(
            inherit(self.tokens).at[:, :, place].set(tokens),
            inherit(self.path).at[:, :, place].set(own),
        )

    def seen(self, place: jax.Array | int) -> jax.Array:
        """bool[B, K, N * K]: which of the slots, K a place, the token at `place` sees in each line, its own as well."""
        batch, lines, length = self.path.shape
        there = jnp.arange(length) <= place
        seen = (self.path[..., None] == jnp.arange(lines)) & there[:, None]
        return seen.reshape(batch, lines, length * lines)


class Choice(Protocol):
    """Which tokens continue which lines."""

    config: GenerationConfig
    end_token: int

    def start(self, batch: int) -> Any:
        """What it has to know; has `open` bool[B, ...], False where nothing can change any more."""

    def choose(self, logits: jax.Array, place: jax.Array | int, lines: Lines, state: Any) -> tuple[Lines, Any]:
        """Continue lines, of whose next token, at `place`, the logits are float32[B, K, V]."""

    def finish(self, lines: Lines, state: Any) -> Written:
        """The texts."""


def places(config: GenerationConfig) -> jax.Array:
    """int32[N * K], the place of the token in each slot of the lines."""
    return jnp.arange(config.max_new_tokens * config.lines, dtype=jnp.int32) // config.lines


def write(writer: Writer, choice: Choice) -> Written:
    """Texts by a model, which has slots for `places`, and a choice."""
    batch, length, count = len(writer.first), choice.config.max_new_tokens, choice.config.lines
    shape = (batch, count, length)
    lines = Lines(jnp.full(shape, choice.end_token, jnp.int32), jnp.zeros(shape, jnp.int32))
    first = writer.logits(writer.first)
    first = jnp.broadcast_to(first[:, None], (batch, count, first.shape[1]))
    lines, state = choice.choose(first, 0, lines, choice.start(batch))

    def goes_on(carry) -> jax.Array:
        place, _, state, _ = carry
        return (place < length) & state.open.any()

    def continued(carry):
        place, lines, state, memory = carry
        tokens = jax.lax.dynamic_index_in_dim(lines.tokens, place - 1, axis=2, keepdims=False)
        hidden, memory = writer.read(memory, tokens, (place - 1) * count, lines.seen(place - 1))
        lines, state = choice.choose(writer.logits(hidden), place, lines, state)
        return place + 1, lines, state, memory

    _, lines, state, _ = jax.lax.while_loop(goes_on, continued, (1, lines, state, writer.state))
    return choice.finish(lines, state)
