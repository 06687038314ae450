"""OPT: learned positions, and that decoding with a cache gives what one pass gives."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np

from blip2_jax.models.language.decoder import empty_cache
from blip2_jax.models.language.opt import OPT, OPTConfig
from blip2_jax.models.layers import causal_mask

CONFIG = OPTConfig(31, 24, layers=3, heads=4, kv_heads=4, head_size=6, mlp_width=40, max_positions=16)


def test_a_cache_gives_what_one_pass_gives():
    variables = OPT(CONFIG).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method="initialize")
    chex.assert_shape(variables["params"]["position_embeddings"]["embedding"], (18, 24))
    embeds = jax.random.normal(jax.random.key(3), (2, 6, 24))
    places = jnp.broadcast_to(jnp.arange(6), (2, 6))
    whole, _ = OPT(CONFIG).apply(variables, embeds, places, causal_mask(6))
    moved, _ = OPT(CONFIG).apply(variables, embeds, places + 1, causal_mask(6))
    assert not np.allclose(whole, moved)
    cache, found = empty_cache(CONFIG, 2, 8), []
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        mask = (jnp.arange(8) <= jnp.arange(start, stop)[:, None])[None, None]
        hidden, cache = OPT(CONFIG).apply(variables, embeds[:, start:stop], places[:, start:stop], mask, cache, start)
        found.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, rtol=1e-4, atol=1e-5)


def test_dropout_is_that_of_a_row_wherever_it_is_computed():
    config = dataclasses.replace(CONFIG, dropout=0.3, attention_dropout=0.2)
    variables = OPT(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method="initialize")
    embeds = jax.random.normal(jax.random.key(3), (4, 6, 24))

    def run(embeds, rows, key=5):
        places = jnp.broadcast_to(jnp.arange(6), embeds.shape[:2])
        rngs = None if rows is None else {"dropout": jax.random.key(key)}
        apply = lambda: OPT(config).apply(variables, embeds, places, causal_mask(6), dropout_rows=rows, rngs=rngs)[0]
        return jax.jit(apply)()

    rows = jnp.arange(4, dtype=jnp.uint32)
    whole = run(embeds, rows)
    np.testing.assert_allclose(run(embeds[1::2], rows[1::2]), whole[1::2], rtol=1e-5, atol=1e-6)
    assert not np.allclose(run(embeds, rows, key=6), whole, atol=1e-2)
    assert not np.allclose(run(embeds, rows[::-1]), whole, atol=1e-2)
    clean = OPT(CONFIG).apply(variables, embeds, jnp.broadcast_to(jnp.arange(6), (4, 6)), causal_mask(6))[0]
    np.testing.assert_allclose(run(embeds, None), clean, rtol=1e-5, atol=1e-6)


def test_dropout_falls_where_the_original_has_it():
    """On what attention adds, on what the MLP adds, and nowhere else: of all of it nothing but the embeddings stays."""
    config = dataclasses.replace(CONFIG, dropout=0.999999)
    model = OPT(config)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32), method="initialize")
    embeds, places = jax.random.normal(jax.random.key(3), (2, 6, 24)), jnp.broadcast_to(jnp.arange(6), (2, 6))
    rows, rngs = jnp.arange(2, dtype=jnp.uint32), {"dropout": jax.random.key(1)}
    found, _ = model.apply(variables, embeds, places, causal_mask(6), dropout_rows=rows, rngs=rngs)
    bound = model.bind(variables)
    np.testing.assert_allclose(found, bound.norm(bound.place(embeds, places)), rtol=1e-5)
