"""Beam search against the definition: every text there is, scored and sorted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax import decoding
from blip2_jax.decoding import GenerationConfig
from tests.decoding.models import END, V, draws, language_model, prefixes, writer

LENGTH = 2


def every_text() -> np.ndarray:
    """int[M, N]: all that has ended, or is as long as can be; END behind an end."""
    texts = [[END] * LENGTH]
    for first, second in itertools.product(range(V), repeat=2):
        if first != END:
            texts.append([first, second])
    return np.asarray(texts, np.int32)


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.0, 2.0])
@pytest.mark.parametrize("kind", ["opt", "llama", "t5"])
def test_with_enough_beams_the_best_texts_of_all(kind, length_penalty):
    config = GenerationConfig(
        LENGTH, num_beams=V + 1, num_return_sequences=6, length_penalty=length_penalty, early_stopping="never"
    )
    embeds, mask = prefixes(3, 5)
    written = writer(kind, config)(embeds, mask, None)
    texts = every_text()
    ends = np.argmax(texts == END, axis=1)
    lengths = np.where((texts == END).any(1), ends + 1, LENGTH)
    there = np.arange(LENGTH) < lengths[:, None]
    module, parameters = language_model(kind)
    spread = lambda x: np.broadcast_to(x, (3, *x.shape))
    log_probability = decoding.log_probabilities(module, parameters, embeds, mask, spread(texts), spread(there))
    scores = np.asarray(log_probability) / lengths.astype(float) ** length_penalty
    best = np.argsort(-scores, axis=1)[:, :6]
    np.testing.assert_allclose(written.scores, np.take_along_axis(scores, best, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(written.tokens, texts[best])


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("convention", ["hf", "lavis"])
def test_a_search_of_one_step_is_sorting(convention, early_stopping):
    """What ends at once competes with what is cut off; LAVIS counts the start token of the latter, too."""
    config = GenerationConfig(
        1, num_beams=4, num_return_sequences=4, convention=convention, early_stopping=early_stopping
    )
    embeds, mask = prefixes(16, 5)
    written = writer("opt", config)(embeds, mask, None)
    module, parameters = language_model("opt")
    texts = np.broadcast_to(np.arange(V)[None, :, None], (16, V, 1))
    scores = np.array(decoding.log_probabilities(module, parameters, embeds, mask, texts, np.ones(texts.shape, bool)))
    if convention == "lavis":
        scores = np.where(np.arange(V) == END, scores, scores / 2)
    order = np.argsort(-scores, axis=1)[:, :4]
    if convention == "hf":
        np.testing.assert_array_equal(written.tokens[..., 0], order)
    np.testing.assert_allclose(written.scores[:, 0], scores.max(1), rtol=1e-4, atol=1e-5)


def test_the_best_of_more_beams_is_no_worse():
    embeds, mask = prefixes(32, 5)
    best = [
        writer("llama", GenerationConfig(6, 6, num_beams=beams, length_penalty=0.0))(embeds, mask, None)
        .scores[:, 0]
        .mean()
        for beams in (2, 4, 16)
    ]
    assert best == sorted(best)


def test_a_score_is_the_log_probability_over_the_length():
    embeds, mask = prefixes(8, 5)
    module, parameters = language_model("opt")
    for config in (GenerationConfig(6, num_beams=3), GenerationConfig(6), GenerationConfig(6, temperature=1.0)):
        written = writer("opt", config)(embeds, mask, draws(range(8)))
        ended = np.cumsum(np.pad(written.tokens[..., :-1], ((0, 0), (0, 0), (1, 0))) == END, axis=-1) > 0
        total = decoding.log_probabilities(module, parameters, embeds, mask, written.tokens, ~ended)
        np.testing.assert_allclose(written.scores, total / (~ended).sum(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_beams": 0}, "num_beams = 0: expected at least 1"),
        ({"num_return_sequences": 3}, "num_return_sequences = 3, but a search with num_beams = 1"),
        ({"num_beams": 2, "temperature": 1.0}, "choose one of them"),
        ({"early_stopping": "soon"}, "early_stopping = 'soon': expected True, False or 'never'"),
        ({"convention": "ours"}, "convention = 'ours': expected one of hf, lavis"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0: expected above 0"),
    ],
)
def test_settings_that_contradict_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(5, **wrong)


def test_candidates_are_judged_as_if_alone():
    """Together in one pass, and each by itself behind the prefix, as one text."""
    rng = np.random.default_rng(0)
    texts, lengths = rng.integers(0, V, (4, 5, 6)), rng.integers(1, 7, (4, 5))
    mask = np.arange(6) < lengths[..., None]
    embeds, prefix = prefixes(4, 5)
    for kind in ("opt", "llama", "t5"):
        module, parameters = language_model(kind)
        judge = jax.jit(lambda *inputs, m=module, p=parameters: decoding.log_probabilities(m, p, *inputs))
        together = judge(embeds, prefix, texts, mask)
        for row, number in itertools.product(range(4), range(5)):
            length = lengths[row, number]
            one = embeds[row : row + 1, : prefix[row].sum()]
            text = jnp.asarray(texts[row : row + 1, number : number + 1, :length])
            alone = decoding.log_probabilities(
                module, parameters, one, jnp.ones(one.shape[:2], bool), text, jnp.ones(text.shape, bool)
            )
            np.testing.assert_allclose(together[row, number], alone[0, 0], rtol=1e-4, atol=1e-5)
