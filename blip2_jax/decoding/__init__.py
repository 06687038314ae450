"""Generation under jit: one loop for every model that writes, with key-value caches of static size.

A row of the batch has K lines that write at the same time: the beams of a beam search, or texts drawn independently.
They share what stands before them (image and prompt), and of each other's tokens a line sees those it descends from, so
that no cache is ever repeated or reordered.

settings       what is to be written
writers        a model in the middle of a text: what it says next
constraints    what may not be written
lines          the loop
sampling       the next token of every line: the likeliest, or one that is drawn
beam_search    the next tokens of the best lines
ranking        how likely given texts are
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from blip2_jax.decoding import writers
from blip2_jax.decoding.beam_search import BeamSearch
from blip2_jax.decoding.constraints import Constraints
from blip2_jax.decoding.lines import places, write
from blip2_jax.decoding.ranking import log_probabilities
from blip2_jax.decoding.sampling import Sampling
from blip2_jax.decoding.settings import Draws, GenerationConfig, Written
from blip2_jax.decoding.writers import Writer, writer_of
from blip2_jax.models.blip2 import ImageTextModel
from blip2_jax.models.language.decoder import Decoder
from blip2_jax.models.language.t5 import START, T5
from blip2_jax.models.qformer import QFormerCache

__all__ = ["Draws", "GenerationConfig", "Written", "caption", "generate", "log_probabilities"]


def generate(
    model: Decoder | T5,
    parameters: dict,
    prefix_embeds: jax.Array,
    prefix_mask: jax.Array,
    config: GenerationConfig,
    end_token: int,
    draws: Draws | None = None,
    history: jax.Array | None = None,
) -> Written:
    """What a language model writes behind a prefix, until every row has ended.

    Args:
      model: the language model; of an encoder-decoder the encoder reads the prefix.
      parameters: its parameters.
      prefix_embeds: float[B, T, D], soft prompt and prompt.
      prefix_mask: bool[B, T]; rows may have gaps, so prompts of any lengths share a batch and
        give what each gives alone.
      config: how.
      end_token: ends a text.
      draws: needed unless the temperature is 0.
      history: int32[B, H], tokens before the text that `repetition_penalty` and `no_repeat_ngram_size` count as
        written, such as those of the prompt; -1: none. An encoder-decoder's start token is always among them.

    Raises:
      ValueError: a temperature without draws.
    """
    if isinstance(model, T5):
        start = jnp.full((len(prefix_embeds), 1), START, jnp.int32)
        history = start if history is None else jnp.concatenate([history, start], axis=1)
    writer = writer_of(model, parameters, prefix_embeds, prefix_mask, places(config))
    return _write(writer, config, end_token, draws, history)


def caption(
    model: ImageTextModel,
    parameters: dict,
    cache: QFormerCache,
    config: GenerationConfig,
    start_token: int,
    end_token: int,
    draws: Draws | None = None,
) -> Written:
    """What the Q-Former itself writes about images that its queries have read, as image-grounded generation taught it.

    Args:
      model: of stage 1.
      parameters: its parameters.
      cache: of `ImageTextModel.image_features`, B rows.
      config: how.
      start_token: stands before every text, [DEC].
      end_token: ends a text.
      draws: needed unless the temperature is 0.

    Raises:
      ValueError: the Q-Former has fewer positions than max_new_tokens, or a temperature without draws.
    """
    positions = model.config.qformer.max_positions
    if config.max_new_tokens > positions:
        raise ValueError(f"max_new_tokens = {config.max_new_tokens}, but the Q-Former has {positions} positions")
    writer = writers.qformer(model, parameters, cache, start_token, places(config))
    history = jnp.full((cache.shape[0], 1), start_token, jnp.int32)
    return _write(writer, config, end_token, draws, history)


def _write(
    writer: Writer, config: GenerationConfig, end_token: int, draws: Draws | None, history: jax.Array | None
) -> Written:
    nothing = jnp.zeros((len(writer.first), 0), jnp.int32)
    constraints = Constraints(config, end_token, nothing if history is None else history)
    if config.num_beams > 1:
        return write(writer, BeamSearch(config, end_token, constraints))
    return write(writer, Sampling(config, end_token, constraints, draws))
