"""How likely given texts are behind a prefix: to choose among candidates instead of writing."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from blip2_jax.decoding.writers import writer_of
from blip2_jax.models.language.decoder import Decoder
from blip2_jax.models.language.t5 import T5


def log_probabilities(
    model: Decoder | T5,
    parameters: dict,
    prefix_embeds: jax.Array,
    prefix_mask: jax.Array,
    text_ids: jax.Array,
    text_mask: jax.Array,
) -> jax.Array:
    """The log-probability of every candidate, the sum over its tokens.

    All candidates of a row are read in one pass behind the same prefix, which is computed once. Divided by
    `text_mask.sum(-1)` they are means over tokens, which do not favour short candidates.

    Args:
      model: the language model; of an encoder-decoder the encoder reads the prefix.
      parameters: its parameters.
      prefix_embeds: float[B, T, D], soft prompt and prompt.
      prefix_mask: bool[B, T], what is there of it.
      text_ids: int32[B, C, U], C candidates, with an end token if that is to count.
      text_mask: bool[B, C, U], filled from the left; a candidate without tokens has the log-probability 0.

    Returns:
      float32[B, C].
    """
    batch, candidates, length = text_ids.shape
    places = jnp.tile(jnp.arange(length, dtype=jnp.int32), candidates)
    writer = writer_of(model, parameters, prefix_embeds, prefix_mask, places)
    of_text = jnp.repeat(jnp.arange(candidates), length)
    seen = (of_text[:, None] == of_text) & (places[:, None] >= places)
    hidden, _ = writer.read(writer.state, text_ids.reshape(batch, -1), 0, seen[None])
    # The prefix predicts the first token of a text, and each token the next one.
    hidden = hidden.reshape(batch, candidates, length, -1)
    first = jnp.broadcast_to(writer.first[:, None, None], (batch, candidates, 1, hidden.shape[-1]))
    hidden = jnp.concatenate([first, hidden[:, :, :-1]], axis=2)

    def of_candidate(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        """One at a time, so that there are never the logits of all tokens."""
        hidden, ids, mask = inputs
        logits = writer.logits(hidden)
        chosen = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
        return jnp.sum(chosen - jax.nn.logsumexp(logits, axis=-1), axis=1, where=mask)

    one_by_one = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (hidden, text_ids, text_mask.astype(bool)))
    return jnp.moveaxis(jax.lax.map(of_candidate, one_by_one), 0, 1)
