"""What stage 2 writes behind prompts, and which of several texts it finds likeliest.

Prompts of any lengths share a batch. Their width and the number of rows are rounded up to a few sizes, so that what is
compiled for one prompt serves the next.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blip2_jax import decoding, params
from blip2_jax.data.pipeline import Batch
from blip2_jax.data.text import pad
from blip2_jax.decoding import Draws, GenerationConfig
from blip2_jax.evaluation.batches import Layout, in_batches
from blip2_jax.models.language.t5 import T5
from blip2_jax.parallel import mesh as meshes

if TYPE_CHECKING:
    from blip2_jax.tasks.stage2 import Stage2

_WIDTH = 16  # Prompts are as wide as a multiple of so many tokens.


class Prompts(NamedTuple):
    """Attributes:
    ids: int32[N, T], tokens behind the soft prompt.
    mask: bool[N, T], filled from the left.
    """

    ids: np.ndarray
    mask: np.ndarray


def rounded(count: int, step: int = _WIDTH) -> int:
    """A number of tokens, rounded up so that there are few sizes; none stays none."""
    return -(-count // step) * step


class Writing:
    """The language model of a stage-2 task with its tokenizer, behind soft prompts float[N, Q, D]."""

    def __init__(self, task: Stage2):
        self._task = task
        self._write = jax.jit(self._write_tokens, static_argnames="config")
        self._rank = jax.jit(self._log_probabilities)

    def instructions(self, prompts: Sequence[str]) -> Batch:
        """What a Q-Former that reads instructions reads, as batches have it; nothing for another."""
        task = self._task
        if not task.config.instruct:
            return {}
        tokenizer, longest = task.caption_tokenizer, task.blip2.qformer.max_positions
        ids, mask = tokenizer(prompts, longest)
        width = min(rounded(int(mask.sum(1).max())), longest)
        return {"instruction_ids": ids[:, :width], "instruction_mask": mask[:, :width]}

    def prompts(self, texts: Sequence[str], room: int) -> Prompts:
        """The tokens of prompts, behind which `room` more are to be written.

        Raises:
          ValueError: a prompt is longer than the language model can read.
        """
        task = self._task
        rows = [task.batches.encode_prompt(text) for text in texts]
        longest = max(range(len(rows)), key=lambda index: len(rows[index]))
        limit = getattr(task.language_model.config, "max_positions", None)
        image = task.blip2.qformer.queries + len(task.tokenizer.begin)
        if limit and image + len(rows[longest]) + room > limit:
            raise ValueError(
                f"the prompt {texts[longest]!r} has {len(rows[longest])} tokens; with {image} of the image and {room} "
                f"to be written that is more than the {limit} positions of the language model: shorten it"
            )
        return Prompts(*pad(rows, rounded(len(rows[longest])), task.tokenizer.padding))

    def write(
        self,
        language: params.Tree,
        soft_prompt: jax.Array | np.ndarray,
        prompts: Sequence[str],
        config: GenerationConfig,
        draws: Draws | None = None,
        label: str = "writing",
    ) -> list[list[str]]:
        """R texts for each of N soft prompts and as many prompts.

        Args:
          language: of `Stage2.language`.
          soft_prompt: float[N, Q, D].
          prompts: N.
          config: how.
          draws: needed with a temperature.
          label: of the progress bar.

        Raises:
          ValueError: a prompt is longer than the language model can read, or a temperature without draws.
        """
        tokenized = self.prompts(prompts, 0 if self._task.reads_apart else config.max_new_tokens)
        key = jax.random.key(0) if draws is None else draws.key
        rows = np.zeros(len(prompts), np.uint32) if draws is None else np.asarray(draws.rows)

        def write(soft_prompt, ids, mask, rows) -> jax.Array:
            drawn = Draws(key, rows) if config.temperature and draws is not None else None
            return self._write(language, soft_prompt, ids, mask, drawn, config=config)

        tokens = self._in_batches(write, (soft_prompt, tokenized.ids, tokenized.mask, rows), label)
        decode = self._task.tokenizer.decode
        return [[decode(text).strip() for text in texts] for texts in tokens]

    def log_probabilities(
        self,
        language: params.Tree,
        soft_prompt: jax.Array | np.ndarray,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        normalize: bool = False,
        label: str = "ranking",
    ) -> np.ndarray:
        """float32[N, C]: how likely each row's candidates are behind its prompt, their end included.

        Args:
          language: of `Stage2.language`.
          soft_prompt: float[N, Q, D].
          prompts: N.
          candidates: as many for each row.
          normalize: by the number of tokens, which does not favour short candidates; else the log-probability.
          label: of the progress bar.
        """
        counts = {len(row) for row in candidates}
        if len(counts) != 1 or not counts.pop():
            raise ValueError("ranking needs candidates, for every row as many")
        tokenizer = self._task.tokenizer
        rows = [[tokenizer.encode_target(text, 1 << 20) for text in row] for row in candidates]
        width = rounded(max(len(text) for row in rows for text in row), 4)
        tokenized = self.prompts(prompts, 0 if self._task.reads_apart else width)
        padded = [pad(row, width, tokenizer.padding) for row in rows]
        ids, mask = np.stack([row[0] for row in padded]), np.stack([row[1] for row in padded])
        rank = functools.partial(self._rank, language)
        found = self._in_batches(rank, (soft_prompt, tokenized.ids, tokenized.mask, ids, mask), label)
        return found / mask.sum(-1) if normalize else found

    def _in_batches(self, function: Callable, arrays: Sequence[np.ndarray], label: str) -> np.ndarray:
        """`function` of all rows of `arrays`, in batches of few sizes."""
        task, count = self._task, len(arrays[0])
        shards = meshes.batch_shards(task.mesh) if task.mesh else 1
        size = shards * min(
            1 << max(-(-count // shards) - 1, 0).bit_length(), task.config.evaluation.batch_size // shards
        )
        layout = Layout(task.mesh or meshes.one_device(), size)
        return in_batches(layout, function, [np.asarray(array) for array in arrays], label)

    # What is compiled.

    def _prefix(self, language: params.Tree, soft_prompt, ids, mask) -> tuple[jax.Array, jax.Array]:
        task = self._task
        model = task.language_model.bind({"params": language})
        image = task.objective.prefix(model, soft_prompt)
        embeds = jnp.concatenate([image, model.embed(ids)], axis=1)
        return embeds, jnp.concatenate([jnp.ones(image.shape[:2], bool), mask], axis=1)

    def _write_tokens(self, language, soft_prompt, ids, mask, draws, *, config: GenerationConfig) -> jax.Array:
        task = self._task
        prefix, present = self._prefix(language, soft_prompt, ids, mask)
        # For transformers what the prompt says has been said; LAVIS knows of a first token alone.
        history = jnp.where(mask, ids, -1)
        if config.convention == "lavis":
            history = jnp.tile(jnp.asarray(task.tokenizer.bos, jnp.int32), (len(ids), 1))
        if isinstance(task.language_model, T5):
            history = None
        return decoding.generate(
            task.language_model, language, prefix, present, config, task.tokenizer.end, draws, history
        ).tokens

    def _log_probabilities(self, language, soft_prompt, ids, mask, text_ids, text_mask) -> jax.Array:
        prefix, present = self._prefix(language, soft_prompt, ids, mask)
        return decoding.log_probabilities(self._task.language_model, language, prefix, present, text_ids, text_mask)
