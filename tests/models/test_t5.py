"""T5: decoding with a cache gives what one pass gives, padding is not seen, distances fall into buckets."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax.models.language.t5 import T5, T5Config, empty_cache, relative_buckets

CONFIG = T5Config(
    vocab_size=31,
    width=24,
    encoder_layers=2,
    decoder_layers=3,
    heads=4,
    head_size=5,
    mlp_width=40,
    buckets=8,
    max_distance=12,
)


@pytest.fixture(scope="module")
def model():
    variables = T5(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method="initialize")
    noise = lambda x: x + 0.2 * jax.random.normal(jax.random.key(1), x.shape)
    parameters = jax.tree.map(noise, variables)["params"]
    return lambda *args, method: T5(CONFIG).apply({"params": parameters}, *args, method=method)


def test_a_cache_gives_what_one_pass_gives(model):
    source, target = jax.random.normal(jax.random.key(2), (2, 5, 24)), jax.random.normal(jax.random.key(3), (2, 6, 24))
    encoded = model(source, jnp.ones((2, 5), bool), method="encode")
    whole, none = model(encoded, target, method="decode")
    assert none is None
    cache, found = empty_cache(CONFIG, 2, 9), []
    for start, stop in ((0, 2), (2, 3), (3, 6)):
        hidden, cache = model(encoded, target[:, start:stop], cache, start, method="decode")
        found.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, rtol=1e-4, atol=1e-5)


def test_the_decoder_looks_back_and_no_further_than_the_text(model):
    source, target = jax.random.normal(jax.random.key(2), (1, 5, 24)), jax.random.normal(jax.random.key(3), (1, 6, 24))
    mask = jnp.array([[True, True, True, False, False]])
    encoded = model(source, mask, method="encode")
    before, _ = model(encoded, target, method="decode")
    after, _ = model(encoded, target.at[:, 4].add(1.0), method="decode")
    chex.assert_trees_all_equal(before[:, :4], after[:, :4])
    assert not np.allclose(before[:, 4:], after[:, 4:])
    padded = model(source.at[:, 3:].add(7.0), mask, method="encode")
    np.testing.assert_allclose(model(padded, target, method="decode")[0], before, atol=1e-5)


def test_buckets():
    distance = jnp.arange(-200, 201)
    two_sided = relative_buckets(distance, True, 32, 128)
    assert sorted(set(two_sided.tolist())) == list(range(16)) + list(range(17, 32))  # No distance is 0 ahead.
    near = dict(zip(distance.tolist(), two_sided.tolist(), strict=True))
    assert [near[d] for d in (0, -1, -7, -8, -127, -200, 1, 7, 200)] == [0, 1, 7, 8, 15, 15, 17, 23, 31]
    one_sided = relative_buckets(distance, False, 32, 128)
    assert (one_sided[distance >= 0] == 0).all()
    assert (np.diff(one_sided[distance <= 0]) <= 0).all()
    assert one_sided.max() == 31


@pytest.fixture(scope="module")
def with_dropout():
    config = dataclasses.replace(CONFIG, dropout=0.3)
    variables = T5(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method="initialize")

    def run(source, target, rows, key=5, rate=0.3):
        def method(model):
            encoded = model.encode(source, jnp.ones(source.shape[:2], bool), rows)
            return model.decode(encoded, target, dropout_rows=rows)[0]

        model = T5(dataclasses.replace(config, dropout=rate))
        rngs = None if rows is None else {"dropout": jax.random.key(key)}
        return jax.jit(lambda: model.apply(variables, method=method, rngs=rngs))()

    return run


def test_dropout_is_that_of_a_row_wherever_it_is_computed(with_dropout):
    source, target = jax.random.normal(jax.random.key(2), (4, 5, 24)), jax.random.normal(jax.random.key(3), (4, 6, 24))
    rows = jnp.arange(4, dtype=jnp.uint32)
    whole = with_dropout(source, target, rows)
    part = with_dropout(source[1::2], target[1::2], rows[1::2])
    np.testing.assert_allclose(part, whole[1::2], rtol=1e-4, atol=1e-5)
    assert not np.allclose(with_dropout(source, target, rows, key=6), whole, atol=1e-2)
    assert not np.allclose(with_dropout(source, target, rows[::-1]), whole, atol=1e-2)
    chex.assert_trees_all_equal(with_dropout(source, target, None), with_dropout(source, target, None, rate=0.0))


def test_the_output_and_the_embeddings_of_a_stack_are_dropped_too(with_dropout):
    """With all but a millionth dropped nothing is left, not even what the residual carries."""
    source, target = jnp.ones((2, 5, 24)), jnp.ones((2, 6, 24))
    assert not with_dropout(source, target, jnp.arange(2, dtype=jnp.uint32), rate=0.999999).any()
