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
    penalty: float32[], weighted sum of each image's mean square of the positive cosines between its queries, 0 to 1.
    cosine: float32[], the same of the cosines themselves: 1 is one query repeated.
    """

    penalty: jax.Array
    cosine: jax.Array


def query_diversity(query_output: jax.Array, weights: jax.Array) -> Diversity:
    """How alike the queries of an image are.

    Args:
      query_output: float[B, Q, D].
      weights: float32[B]; summing to 1 they give means over images.
    """
    queries = query_output.shape[1]
    x = query_output.astype(jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    cosine = jnp.einsum("bid,bjd->bij", x, x)
    others = queries * (queries - 1)
    total = lambda values: (values * (1 - jnp.eye(queries))[None]).sum((1, 2)) @ weights / max(others, 1)
    return Diversity(total(jnp.square(jnp.maximum(cosine, 0.0))), total(cosine))
