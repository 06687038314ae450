"""What may not be written, against plain loops."""

import numpy as np
import pytest

from blip2_jax.decoding import GenerationConfig
from blip2_jax.decoding.constraints import Constraints

B, K, V, N, END = 3, 2, 11, 8, 4


@pytest.fixture
def drawn(rng):
    """Scores, lines and a history in which tokens come back."""
    history = rng.integers(-1, 4, (B, 5)).astype(np.int32)
    return rng.normal(size=(B, K, V)).astype(np.float32), rng.integers(0, 4, (B, K, N)).astype(np.int32), history


def written(history, tokens, place, row, line):
    return [*(token for token in history[row] if token >= 0), *tokens[row, line, :place]]


@pytest.mark.parametrize("place", [0, 3, 7])
def test_what_was_written_is_less_likely(drawn, place):
    scores, tokens, history = drawn
    found = Constraints(GenerationConfig(N, repetition_penalty=1.7), END, history)(scores, tokens, place)
    for row, line, token in np.ndindex(B, K, V):
        score = scores[row, line, token]
        if token in written(history, tokens, place, row, line):
            score = score * 1.7 if score < 0 else score / 1.7
        np.testing.assert_allclose(found[row, line, token], score, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("place", [0, 3, 7])
def test_no_sequence_comes_twice(drawn, place, size):
    scores, tokens, history = drawn
    history = np.sort(history >= 0, axis=1) * np.abs(history) - (
        np.sort(history >= 0, axis=1) == 0
    )  # Gaps to the left.
    history = history.astype(np.int32)
    found = np.asarray(Constraints(GenerationConfig(N, no_repeat_ngram_size=size), END, history)(scores, tokens, place))
    forbidden = 0
    for row, line, token in np.ndindex(B, K, V):
        text = written(history, tokens, place, row, line)
        known = {tuple(text[start : start + size]) for start in range(len(text) - size + 1)}
        repeats = len(text) >= size - 1 and tuple([*text[len(text) - size + 1 :], token]) in known
        assert np.isneginf(found[row, line, token]) == repeats, (row, line, token, text)
        forbidden += repeats
    assert forbidden or place == 0


def test_no_end_before_its_time(drawn):
    scores, tokens, history = drawn
    constraints = Constraints(GenerationConfig(N, 3), END, history)
    for place in range(5):
        found = np.asarray(constraints(scores, tokens, place))
        assert np.isneginf(found[..., END]).all() == (place < 3)
        np.testing.assert_array_equal(np.delete(found, END, -1), np.delete(scores, END, -1))
