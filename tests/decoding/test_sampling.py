"""The loop that writes texts: who may be drawn, by what, and that caches change nothing."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax import decoding
from blip2_jax.decoding import Draws, GenerationConfig, sampling
from blip2_jax.models.blip2 import Blip2Config, ImageTextModel
from blip2_jax.models.language.llama import Llama, LlamaConfig
from blip2_jax.models.qformer import QFormerConfig
from tests.meshes import surrounding

START, END, V = 20, 3, 21


@pytest.fixture(scope="module", params=[(3, 2), (1, 2), (2, 1)], ids=lambda layers: f"{layers[0]}by{layers[1]}")
def captioner(request):
    """A stage 1 with some images' cache, random but far from uniform."""
    layers, every = request.param
    sizes = {"width": 16, "heads": 4, "mlp_width": 32, "vocab_size": V, "max_positions": 9, "queries": 3}
    qformer = QFormerConfig(**sizes, layers=layers, cross_attention_every=every, dropout=0.0, attention_dropout=0.0)
    model = ImageTextModel(Blip2Config(qformer, embed_width=4))
    embeds = jax.random.normal(jax.random.key(0), (8, 5, 7))

    def every_pass(model, embeds, ids):
        seen = model.image_features(model.project_image(embeds))
        return seen.cache, model.caption_features(seen.cache, ids, jnp.ones(ids.shape, bool))

    init = functools.partial(model.init, method=every_pass)
    parameters = jax.jit(init)(jax.random.key(1), embeds, jnp.zeros((8, 4), jnp.int32))["params"]
    parameters = jax.tree.map(lambda x: x * 4 + 0.1 * jax.random.normal(jax.random.key(2), x.shape), parameters)
    read = lambda model, embeds: model.image_features(model.project_image(embeds)).cache
    return model, parameters, model.apply({"params": parameters}, embeds, method=read)


def write(captioner, config, draws=None, cache=None):
    model, parameters, images = captioner
    function = functools.partial(decoding.caption, model, config=config, start_token=START, end_token=END)
    return np.asarray(jax.jit(function)(parameters, images if cache is None else cache, draws=draws).tokens[:, 0])


def teacher_forced(captioner, tokens):
    """float[B, N, V]: the logits of each of the tokens int[B, N], all at once behind the queries."""
    model, parameters, cache = captioner
    ids = np.concatenate([np.full((len(tokens), 1), START), tokens[:, :-1]], axis=1)
    forced = jax.jit(functools.partial(model.apply, method="caption_features"))
    features, matrix, bias = forced({"params": parameters}, cache, ids, jnp.ones(ids.shape, bool))
    return np.asarray(features @ matrix.T + bias)


def test_greedy_captions_are_those_of_teacher_forcing(captioner):
    tokens = write(captioner, GenerationConfig(9))
    expected = teacher_forced(captioner, tokens).argmax(-1)
    ended = np.cumsum(np.pad(tokens[:, :-1], ((0, 0), (1, 0))) == END, axis=1) > 0
    assert len(np.unique(tokens)) > 3
    np.testing.assert_array_equal(tokens, np.where(ended, END, expected))


def test_a_text_does_not_end_before_its_minimum(captioner):
    ends = captioner[1] | {"qformer": captioner[1]["qformer"] | {"lm_head": captioner[1]["qformer"]["lm_head"].copy()}}
    ends["qformer"]["lm_head"]["bias"] = jnp.zeros(V).at[END].set(1e3)
    likes_to_end = captioner[0], ends, captioner[2]
    assert (write(likes_to_end, GenerationConfig(6)) == END).all()
    tokens = write(likes_to_end, GenerationConfig(6, min_new_tokens=4))
    assert (tokens[:, :4] != END).all()
    assert (tokens[:, 4:] == END).all()


def test_no_longer_than_the_positions(captioner):
    with pytest.raises(ValueError, match="max_new_tokens = 10, but the Q-Former has 9 positions"):
        write(captioner, GenerationConfig(10))


SAMPLED = GenerationConfig(5, temperature=0.8, top_p=0.9, top_k=12)


def test_a_sample_is_a_function_of_key_and_row(captioner):
    rows = jnp.arange(100, 108, dtype=jnp.uint32)
    tokens = write(captioner, SAMPLED, Draws(jax.random.key(5), rows))
    assert (tokens == write(captioner, SAMPLED, Draws(jax.random.key(5), rows))).all()
    assert (tokens != write(captioner, SAMPLED, Draws(jax.random.key(6), rows))).any()
    assert (tokens != write(captioner, SAMPLED, Draws(jax.random.key(5), rows + 8))).any()
    # In another batch, at another place, on a mesh.
    part = jax.tree.map(lambda x: jnp.flip(x, axis=x.ndim - 4)[..., 2:5, :, :, :], captioner[2])
    other = write(captioner, SAMPLED, Draws(jax.random.key(5), rows[::-1][2:5]), part)
    np.testing.assert_array_equal(other, tokens[::-1][2:5])
    for mesh in ("data=8", "data=2,fsdp=2,tensor=2"):
        with surrounding(mesh):
            np.testing.assert_array_equal(write(captioner, SAMPLED, Draws(jax.random.key(5), rows)), tokens)


def test_drawing_needs_a_key(captioner):
    with pytest.raises(ValueError, match=r"temperature = 0\.8 draws tokens"):
        write(captioner, SAMPLED)


def test_samples_follow_the_distribution():
    """20,000 first tokens of one row against the truth by sorting."""
    logits = np.asarray(jax.random.normal(jax.random.key(0), (1, V)) * 2, np.float32)
    probability = np.exp(logits[0] / 1.3)
    probability /= probability.sum()
    order = np.argsort(-probability)
    chosen = order[:8]  # top_k
    share = probability[chosen] / probability[chosen].sum()
    nucleus = chosen[: int(np.argmax(np.cumsum(share) >= 0.8)) + 1]
    assert 2 < len(nucleus) < 8
    expected = np.zeros(V)
    expected[nucleus] = probability[nucleus] / probability[nucleus].sum()
    config = GenerationConfig(1, temperature=1.3, top_p=0.8, top_k=8)
    count = 20_000
    draws = Draws(jax.random.key(1), jnp.arange(count, dtype=jnp.uint32))
    draw = jax.jit(lambda logits, draws: sampling.draw(jnp.repeat(logits[:, None], count, 0), config, draws, 0))
    found = np.bincount(np.asarray(draw(logits, draws))[:, 0], minlength=V) / count
    assert (found[expected == 0] == 0).all()
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / np.sqrt(count))


@pytest.mark.parametrize("amount", [1e-6, 0.3, 0.5, 0.75, 0.9, 2.0])
def test_the_likeliest_are_those_that_sorting_finds(amount, rng):
    probabilities = rng.dirichlet(np.full(50, 0.3), size=7).astype(np.float32)
    kept = np.asarray(sampling.likeliest(probabilities, probabilities, amount))
    for row, found in zip(probabilities, kept, strict=True):
        order = np.argsort(-row, kind="stable")
        needed = np.cumsum(row[order], dtype=np.float64) - row[order] < amount
        np.testing.assert_array_equal(np.flatnonzero(found), np.sort(order[needed]))


def test_equally_likely_tokens_belong_together():
    row = np.asarray([[0.25, 0.125, 0.25, 0.125, 0.25]], np.float32)
    assert sampling.likeliest(row, np.ones_like(row), 2).tolist() == [[True, False, True, False, True]]


@pytest.fixture(scope="module")
def language_model():
    config = LlamaConfig(vocab_size=31, width=24, layers=2, heads=4, kv_heads=2, head_size=6, mlp_width=40)
    model = Llama(config)
    parameters = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), method="initialize")["params"]
    return model, jax.tree.map(lambda x: x * 3, parameters)


def test_a_language_model_draws_by_row_as_well(language_model):
    model, parameters = language_model
    prefix, mask = jax.random.normal(jax.random.key(1), (6, 4, 24)), np.ones((6, 4), bool)
    config = GenerationConfig(6, temperature=1.0, top_p=0.9)
    generate = functools.partial(decoding.generate, model, parameters)
    draw = jax.jit(lambda prefix, mask, draws: generate(prefix, mask, config, 30, draws).tokens)
    rows = jnp.arange(6, dtype=jnp.uint32)
    tokens = draw(prefix, mask, Draws(jax.random.key(2), rows))
    chex.assert_trees_all_equal(draw(prefix[3:5], mask[3:5], Draws(jax.random.key(2), rows[3:5])), tokens[3:5])
    # Hardly any temperature is none.
    cold = GenerationConfig(6, temperature=1e-4)
    cold = generate(prefix, mask, cold, 30, Draws(jax.random.key(2), rows)).tokens
    chex.assert_trees_all_equal(cold, generate(prefix, mask, GenerationConfig(6), 30).tokens)
    assert (cold != tokens).any()


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"min_new_tokens": 6}]
)
def test_settings_that_mean_nothing_are_refused(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name} = {value}: expected"):
        GenerationConfig(5, **wrong)
