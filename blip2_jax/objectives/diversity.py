"""Keeping the queries apart.

Nothing in ITC, ITM and ITG asks the queries to differ, and self-attention that was trained to pool sentences averages
them: after a hundred steps from MiniLM the outputs of all queries were one vector (mean cosine 0.99999), and the
language model of stage 2 learnt hardly anything from it. This term is not in the paper.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Diversity(NamedTuple):
    """Attributes:
    penalty: float32[], mean square of the positive cosines between different queries of an image, 0 to 1.
    cosine: float32[], their mean: 1 is one query repeated.
    """

    penalty: jax.Array
    cosine: jax.Array


def query_diversity(query_output: jax.Array, example_mask: jax.Array) -> Diversity:
    """How alike the queries of an image are.

    Args:
      query_output: float[B, Q, D].
      example_mask: bool[B]; False rows do not count.
    """
    queries = query_output.shape[1]
    x = query_output.astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    cosine = jnp.einsum("bid,bjd->bij", x, x)
    weight = (1 - jnp.eye(queries))[None] * example_mask[:, None, None]
    mean = lambda values: (values * weight).sum() / jnp.maximum(weight.sum(), 1.0)
    return Diversity(mean(jnp.square(jnp.maximum(cosine, 0.0))), mean(cosine))
