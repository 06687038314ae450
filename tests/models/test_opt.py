"""OPT: learned positions, and that decoding with a cache gives what one pass gives."""

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
