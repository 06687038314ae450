"""The Llama decoder: causality, padding, and that decoding with a cache gives what a whole pass gives."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax import decoding
from blip2_jax.decoding import GenerationConfig
from blip2_jax.models.language import join
from blip2_jax.models.language.decoder import empty_cache
from blip2_jax.models.language.llama import Llama, LlamaConfig, Rope, rotate
from blip2_jax.models.layers import causal_mask

CONFIG = LlamaConfig(vocab_size=31, width=24, layers=3, heads=6, kv_heads=2, head_size=4, mlp_width=40)
END = 5


@pytest.fixture(scope="module")
def model():
    ids = jnp.zeros((1, 2), jnp.int32)
    variables = Llama(CONFIG).init(jax.random.key(0), ids, method="initialize")
    # Larger than at initialisation, so that the likeliest token is clear.
    variables = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape), variables)
    return Llama(CONFIG), variables["params"]


def whole(model, embeds):
    """Logits of every position in one pass."""
    module, parameters = model
    batch, length = embeds.shape[:2]
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    hidden, _ = module.apply({"params": parameters}, embeds, positions, causal_mask(length))
    return hidden @ module.apply({"params": parameters}, method="head").T


def test_shapes(model):
    module, parameters = model
    chex.assert_shape(whole(model, jnp.ones((2, 7, 24))), (2, 7, 31))
    chex.assert_shape(module.apply({"params": parameters}, jnp.zeros((2, 7), int), method="embed"), (2, 7, 24))
    chex.assert_shape(empty_cache(CONFIG, 2, 9), (3, 2, 9, 2, 4))


def test_causality(model):
    embeds = jax.random.normal(jax.random.key(2), (1, 6, 24))
    changed = embeds.at[:, 4].add(1.0)
    before, after = whole(model, embeds), whole(model, changed)
    chex.assert_trees_all_equal(before[:, :4], after[:, :4])
    assert not np.allclose(before[:, 4:], after[:, 4:])


def test_a_cache_gives_what_one_pass_gives(model):
    module, parameters = model
    embeds = jax.random.normal(jax.random.key(3), (2, 6, 24))
    expected = whole(model, embeds)
    cache, found = empty_cache(CONFIG, 2, 8), []
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        mask = (jnp.arange(8) <= jnp.arange(start, stop)[:, None])[None, None]
        positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
        hidden, cache = module.apply({"params": parameters}, embeds[:, start:stop], positions, mask, cache, start)
        found.append(hidden @ module.apply({"params": parameters}, method="head").T)
    np.testing.assert_allclose(jnp.concatenate(found, 1), expected, rtol=1e-4, atol=1e-4)


def test_rotation_keeps_lengths_and_depends_on_the_difference_of_positions():
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    at = lambda x, position: rotate(x, jnp.array([[position]]), Rope(100.0))[0, 0, 0]
    np.testing.assert_allclose(jnp.linalg.norm(at(x, 7)), jnp.linalg.norm(x), rtol=1e-5)
    np.testing.assert_allclose(at(x, 7) @ at(y, 4), at(x, 13) @ at(y, 10), rtol=1e-4)
    np.testing.assert_allclose(at(x, 0), x[0, 0, 0], rtol=1e-6)


def naive_greedy(model, prefix, steps):
    """Token by token, each time the whole sequence again; what fills it up at the end is hidden by causality."""
    module, parameters = model
    logits = jax.jit(lambda embeds: whole(model, embeds[None])[0])
    row = jnp.pad(prefix, ((0, 16 - len(prefix)), (0, 0)))
    tokens = []
    for length in range(len(prefix), len(prefix) + steps):
        token = int(logits(row)[length - 1].argmax())
        tokens.append(token)
        if token == END:
            break
        row = row.at[length].set(module.apply({"params": parameters}, jnp.array([[token]]), method="embed")[0, 0])
    return tokens + [END] * (steps - len(tokens))


def test_greedy_is_the_naive_loop_alone_and_in_a_ragged_batch(model):
    module, parameters = model
    lengths = [3, 6, 1, 4]
    prefixes = [jax.random.normal(jax.random.key(10 + i), (n, 24)) for i, n in enumerate(lengths)]
    expected = [naive_greedy(model, prefix, 7) for prefix in prefixes]
    greedy = jax.jit(lambda e, m: decoding.generate(module, parameters, e, m, GenerationConfig(7), END).tokens[:, 0])
    for prefix, tokens in zip(prefixes, expected, strict=True):
        assert greedy(prefix[None], jnp.ones((1, len(prefix)), bool))[0].tolist() == tokens
    for side in ("left", "right", "middle"):
        embeds, mask = np.full((4, 6, 24), 9.0, np.float32), np.zeros((4, 6), bool)
        for row, prefix in enumerate(prefixes):
            n = len(prefix)
            places = {"left": range(6 - n, 6), "right": range(n), "middle": [0, *range(6 - n + 1, 6)]}[side]
            embeds[row, list(places)], mask[row, list(places)] = prefix, True
        assert greedy(embeds, mask).tolist() == expected, f"padding on the {side}"


def test_greedy_stops_at_the_end_token(model):
    module, parameters = model
    prefix = jax.random.normal(jax.random.key(4), (1, 3, 24))
    write = lambda end: decoding.generate(module, parameters, prefix, jnp.ones((1, 3), bool), GenerationConfig(6), end)
    free = write(30).tokens[0, 0].tolist()
    end = free[2]
    first = free.index(end)
    assert write(end).tokens[0, 0].tolist() == [*free[: first + 1], *[end] * (5 - first)]


def test_join_leaves_no_gap():
    row = join(
        jnp.array([[1, 2, 0], [3, 0, 0]]),
        jnp.array([[True, True, False], [True, False, False]]),
        jnp.array([[7, 8], [9, 0]]),
        jnp.array([[True, True], [True, False]]),
        5,
    )
    assert (row.ids * row.mask).tolist() == [[1, 2, 7, 8, 0], [3, 9, 0, 0, 0]]
    assert row.mask.tolist() == [[True] * 4 + [False], [True] * 2 + [False] * 3]
    assert row.is_target.tolist() == [[False, False, True, True, False], [False, True, False, False, False]]


def test_join_without_a_prompt_and_cut():
    empty = jnp.zeros((1, 0), int)
    row = join(empty, empty.astype(bool), jnp.array([[7, 8, 9]]), jnp.ones((1, 3), bool), 2)
    assert row.ids.tolist() == [[7, 8]]
    assert row.is_target.all()
