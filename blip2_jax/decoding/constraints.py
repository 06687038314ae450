"""What may not be written, or is made less likely: repetitions, and an end before its time."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from blip2_jax.decoding.settings import GenerationConfig


class Constraints(NamedTuple):
    """Attributes:
    config: how texts are written.
    end_token: ends one.
    history: int32[B, H], what counts as written before; -1: nothing.
    """

    config: GenerationConfig
    end_token: int
    history: jax.Array

    def __call__(self, scores: jax.Array, tokens: jax.Array, place: jax.Array | int) -> jax.Array:
        """Scores of the next tokens, logits or log-probabilities, under the constraints.

        Args:
          scores: float32[B, K, V].
          tokens: int32[B, K, N], the lines so far.
          place: of the next token; what `tokens` hold from there on does not count.
        """
        config = self.config
        if config.repetition_penalty != 1 or config.no_repeat_ngram_size:
            history = jnp.broadcast_to(self.history[:, None], (*tokens.shape[:2], self.history.shape[1]))
            there = jnp.arange(tokens.shape[2]) < place
            written = jnp.concatenate([history, jnp.where(there, tokens, -1)], axis=-1)
            if config.repetition_penalty != 1:
                scores = _penalized(scores, written, config.repetition_penalty)
            if config.no_repeat_ngram_size:
                end = history.shape[-1] + place
                scores = _without_repetition(scores, written, end, config.no_repeat_ngram_size)
        if config.min_new_tokens:
            is_end = jnp.arange(scores.shape[-1]) == self.end_token
            scores = jnp.where(is_end & (place < config.min_new_tokens), -jnp.inf, scores)
        return scores


def _marked(tokens: jax.Array, vocabulary: int) -> jax.Array:
    """int32[B, K, M], those below 0 meaning nothing -> bool[B, K, V], the tokens among them."""
    batch, lines = tokens.shape[:2]
    row, line = jnp.arange(batch)[:, None, None], jnp.arange(lines)[:, None]
    nothing = jnp.zeros((batch, lines, vocabulary), bool)
    return nothing.at[row, line, jnp.where(tokens < 0, vocabulary, tokens)].set(True, mode="drop")


def _penalized(scores: jax.Array, written: jax.Array, penalty: float) -> jax.Array:
    less = jnp.where(scores < 0, scores * penalty, scores / penalty)
    return jnp.where(_marked(written, scores.shape[-1]), less, scores)


def _without_repetition(scores: jax.Array, written: jax.Array, end: jax.Array | int, size: int) -> jax.Array:
    """Forbid what would end a sequence of `size` tokens that int32[B, K, M] hold already before `end`."""
    length = written.shape[-1]
    # Had the same size - 1 tokens as the last ones stood before a place, the token of that place may not follow them.
    forbidden = jnp.arange(length) >= size - 1
    for back in range(1, size):
        last = jnp.take(written, end - back, axis=-1, mode="fill", fill_value=-2)[..., None]
        forbidden = forbidden & (jnp.roll(written, back, axis=-1) == last) & (last >= 0)
    tokens = jnp.where(forbidden & (jnp.arange(length) < end), written, -1)
    return jnp.where(_marked(tokens, scores.shape[-1]), -jnp.inf, scores)
