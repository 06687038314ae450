"""Beam search: of all continuations of K lines the best K go on, and those that end compete by score.

A score is the log-probability over a power of the length, so that texts of different lengths compare. How long a text
counts as, and when nothing better can come, differs between programs, and captions with it: see
`GenerationConfig.convention`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from blip2_jax.decoding.constraints import Constraints
from blip2_jax.decoding.lines import Lines
from blip2_jax.decoding.settings import GenerationConfig, Written

# Below the log-probability of any text, yet finite, so that sums of it are.
_NEVER = -1e9


class State(NamedTuple):
    """Attributes:
    open: bool[B], rows whose finished texts may still be surpassed.
    log_probability: float32[B, K], of the lines that go on, the best first.
    finished: int32[B, K, N], the best texts that have ended, and
    scores: float32[B, K], theirs, the best first; `_NEVER` where there are fewer.
    """

    open: jax.Array
    log_probability: jax.Array
    finished: jax.Array
    scores: jax.Array


class BeamSearch:
    """See `lines.Choice`."""

    def __init__(self, config: GenerationConfig, end_token: int, constraints: Constraints):
        self.config, self.end_token, self._constraints = config, end_token, constraints
        self._lavis = config.convention == "lavis"

    def start(self, batch: int) -> State:
        beams, length = self.config.num_beams, self.config.max_new_tokens
        # All lines begin alike, so one of them is enough.
        first = jnp.where(jnp.arange(beams) == 0, 0.0, _NEVER)
        return State(
            jnp.ones(batch, bool),
            jnp.broadcast_to(first, (batch, beams)),
            jnp.full((batch, beams, length), self.end_token, jnp.int32),
            jnp.full((batch, beams), _NEVER),
        )

    def choose(self, logits, place, lines: Lines, state: State) -> tuple[Lines, State]:
        beams = self.config.num_beams
        gained = self._constraints(jax.nn.log_softmax(logits), lines.tokens, place)
        # Of twice as many candidates as lines, enough do not end. Only the first half of them may end here.
        total, parent, token = _best(state.log_probability[..., None] + gained, 2 * beams)
        ends = token == self.end_token
        if not self._lavis:
            ends |= place == self.config.max_new_tokens - 1
        ended = jnp.where(ends & (jnp.arange(2 * beams) < beams), self._score(total, place + 1), _NEVER)
        state = self._with_finished(state, lines.extended(parent, token, place).tokens, ended)
        running, chosen = jax.lax.top_k(jnp.where(ends, total + _NEVER, total), beams)
        chosen_of = lambda x: jnp.take_along_axis(x, chosen, axis=1)
        lines = lines.extended(chosen_of(parent), chosen_of(token), place)
        still_open = state.open & self._may_improve(state.scores, (total if self._lavis else running)[:, 0], place + 1)
        return lines, state._replace(log_probability=running, open=still_open)

    def finish(self, lines: Lines, state: State) -> Written:
        if self._lavis:
            score = self._score(state.log_probability, self.config.max_new_tokens + 1)
            state = self._with_finished(state, lines.tokens, score)
        returned = self.config.num_return_sequences
        return Written(state.finished[:, :returned], state.scores[:, :returned])

    def _score(self, log_probability: jax.Array, length: jax.Array | int) -> jax.Array:
        return log_probability / jnp.asarray(length, jnp.float32) ** self.config.length_penalty

    def _with_finished(self, state: State, tokens: jax.Array, scores: jax.Array) -> State:
        """Let further texts int32[B, M, N] compete by float32[B, M], in rows that are open."""
        scores = jnp.concatenate([state.scores, jnp.where(state.open[:, None], scores, _NEVER)], axis=1)
        scores, best = jax.lax.top_k(scores, self.config.num_beams)
        tokens = jnp.concatenate([state.finished, tokens], axis=1)
        return state._replace(scores=scores, finished=jnp.take_along_axis(tokens, best[..., None], axis=1))

    def _may_improve(self, scores: jax.Array, best: jax.Array, length: jax.Array) -> jax.Array:
        """bool[B]: whether a line, of which the best has the log-probability float32[B], may yet be among the best."""
        config = self.config
        worst = scores[:, -1]
        full = worst > _NEVER / 2
        if config.early_stopping is True:
            return ~full
        if config.early_stopping == "never" and config.length_penalty > 0:
            length = config.max_new_tokens
        return ~full | (self._score(best, length + self._lavis) > worst)


def _best(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best candidates of float32[B, K, V], best first: their scores, lines and tokens, [B, count] each."""
    of_line, token = jax.lax.top_k(scores, min(count, scores.shape[-1]))
    best, place = jax.lax.top_k(of_line.reshape(len(scores), -1), count)
    return best, place // of_line.shape[-1], jnp.take_along_axis(token.reshape(len(scores), -1), place, axis=1)
