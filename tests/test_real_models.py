"""The real frozen parts of the nano recipe, by what they can do; fetched into the user's cache where missing."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax import decoding, tasks
from blip2_jax.checkpoints import frozen
from blip2_jax.data import images
from blip2_jax.data.sources import open_source
from blip2_jax.data.text import LanguageTokenizer, pad
from blip2_jax.decoding import GenerationConfig
from blip2_jax.models.layers import causal_mask

PARAGRAPH = (
    "The river rises in the northern hills and flows for about 120 miles through farmland before it reaches the sea. "
    "In spring, when the snow melts, the water often floods the lower meadows, and the people who live there have "
    "learned to build their houses on higher ground."
)


@pytest.fixture(scope="module")
def language():
    part = frozen.find("llm", "nano:")
    model = frozen.language_model(part, np.float32)
    parameters = frozen.load_language_model(part, model, np.float32)
    return model, parameters, LanguageTokenizer(part.path)


def perplexity(model, parameters, tokenizer, text):
    ids = jnp.asarray([tokenizer.encode(text)])

    @jax.jit
    def losses(parameters, ids):
        bound = model.bind({"params": parameters})
        hidden, _ = bound(bound.embed(ids), jnp.arange(ids.shape[1])[None], causal_mask(ids.shape[1]))
        log_probabilities = jax.nn.log_softmax(hidden @ bound.head().T)
        return -jnp.take_along_axis(log_probabilities[:, :-1], ids[:, 1:, None], axis=-1)

    return float(jnp.exp(losses(parameters, ids).mean()))


def test_the_language_model_knows_english(language):
    """Transformers gives 21.456 on the same weights and tokens; llama.cpp's row order left as it is gives thousands."""
    plain = perplexity(*language, PARAGRAPH)
    words = PARAGRAPH.split()
    shuffled = perplexity(*language, " ".join(np.random.default_rng(0).permutation(words)))
    assert plain == pytest.approx(21.456, rel=2e-3)
    assert shuffled > 20 * plain


def test_the_language_model_goes_on_with_a_fact(language):
    model, parameters, tokenizer = language
    prompts = ["The capital of France is", "Monday, Tuesday,"]
    ids, mask = pad([tokenizer.encode_prompt(prompt) for prompt in prompts], 12, tokenizer.padding)
    embeds = model.apply({"params": parameters}, ids, method="embed")
    written = decoding.generate(model, parameters, embeds, mask, GenerationConfig(3), tokenizer.end)
    texts = [tokenizer.decode(row) for row in np.asarray(written.tokens[:, 0])]
    assert texts[0].startswith(" Paris")
    assert texts[1].startswith(" Wednesday")


def test_bert_puts_like_sentences_together(sentence_task):
    vectors = sentence_task.sentence_embeddings(["a cat sleeps", "a kitten is napping", "the stock market fell"])
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.5
    assert similarity[0, 1] > similarity[0, 2] + 0.3


@pytest.fixture(scope="module")
def sentence_task():
    config = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "configs" / "stage1.py"))["get_config"]()
    return tasks.create(config)


def test_two_artists_draw_the_same_thing_alike(sentence_task):
    """The encoder's own features find the other artist's drawing of a thing far more often than chance."""
    source = open_source("nano:train")
    records = [source[index] for index in range(len(source))]
    by_name: dict[str, list] = {}
    for record in records:
        by_name.setdefault(record["captions"][0], []).append(record)
    pairs = [group for group in by_name.values() if len({r["key"] for r in group}) == 2][:48]
    assert len(pairs) == 48
    sides = []
    for side in (0, 1):
        drawn = np.stack([images.resize(images.decode(pair[side]["image"]), 160) for pair in pairs])
        features = np.asarray(sentence_task.encode(drawn)).mean(1)
        sides.append(features / np.linalg.norm(features, axis=-1, keepdims=True))
    nearest = (sides[0] @ sides[1].T).argmax(1)
    assert (nearest == np.arange(48)).mean() > 0.5
