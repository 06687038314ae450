"""The loss of stage 2 on a batch of arrays, in one piece or several; it knows nothing of sources, texts and files."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from blip2_jax import params
from blip2_jax.compat import Compat
from blip2_jax.data.pipeline import Batch
from blip2_jax.models import lora
from blip2_jax.models.blip2 import SoftPromptModel
from blip2_jax.models.language import join
from blip2_jax.models.language.decoder import Decoder
from blip2_jax.models.language.t5 import START, T5
from blip2_jax.models.layers import causal_mask
from blip2_jax.objectives.language_modeling import language_modeling_loss, token_weights
from blip2_jax.parallel.rows import rows_of
from blip2_jax.tasks.encoding import Encode, image_embeds


class Texts(NamedTuple):
    """What the language model reads behind the soft prompt, and what it is to write.

    Attributes:
      ids, mask: int32[B, T], bool[B, T]; a decoder reads prompts and targets in one row, an encoder the prompts.
      targets: int32[B, U]; a decoder's row again, an encoder-decoder's targets.
      counts: bool[B, U], those that are to be predicted, of rows that are there.
    """

    ids: jax.Array
    mask: jax.Array
    targets: jax.Array
    counts: jax.Array


def _tables_whole(language: params.Tree) -> params.Tree:
    """The same with every table of embeddings whole on each device of the surrounding mesh.

    From a divided table every device would look up its part of the rows of all devices, and then exchange them.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return language
    whole = lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec())
    return {name: jax.tree.map(whole, tree) if name.endswith("embeddings") else tree for name, tree in language.items()}


@dataclasses.dataclass(frozen=True)
class Stage2Loss:
    """Mean cross-entropy of the target tokens behind soft prompt and prompt, and its gradient.

    A batch has `example_mask` bool[B], `prompt_ids`, `prompt_mask`, `target_ids`, `target_mask`, filled from the left,
    `image_embeds` or `image`, and for an InstructBLIP `instruction_ids` and `instruction_mask`.

    Attributes:
      model: the Q-Former with the language projection.
      language_model: a decoder, or an encoder-decoder whose encoder reads soft prompt and prompt.
      encode: of `tasks.encoding`.
      begin: tokens before everything.
      row_length: T of a decoder's rows of prompt and target; 0: as long as both fields together.
      pieces: in so many a batch goes through, which changes memory and time, not the gradient.
      compat: of its switches `rank_token_mean`, `world_size` and `llm_dropout`.
      lora_scale: of adapters, which stand in the trainable tree under "lora" (`models.lora`).
    """

    model: SoftPromptModel
    language_model: Decoder | T5
    encode: Encode
    begin: tuple[int, ...] = ()
    row_length: int = 0
    pieces: int = 1
    compat: Compat = dataclasses.field(default_factory=Compat)
    lora_scale: float = 0.0

    @property
    def reads_apart(self) -> bool:
        """Whether prompts are for an encoder."""
        return isinstance(self.language_model, T5)

    def texts(self, batch: Batch) -> Texts:
        """The tokens of a batch as the language model takes them."""
        prompt, target = ((batch[f"{name}_ids"], batch[f"{name}_mask"]) for name in ("prompt", "target"))
        real = batch["example_mask"][:, None]
        if self.reads_apart:
            return Texts(*prompt, target[0], target[1] & real)
        row = join(*prompt, *target, self.row_length or prompt[0].shape[1] + target[0].shape[1])
        return Texts(row.ids, row.mask, row.ids, row.is_target & real)

    def soft_prompt(
        self, trainable: params.Tree, image_embeds: jax.Array, batch: Batch, rows: jax.Array | None = None, key=None
    ) -> jax.Array:
        """float[B, P, D_image] -> float[B, Q, D_language].

        With the Q-Former's dropout if `rows`, uint32[B], and a key for it are given.
        """
        instruction = [batch[name] for name in ("instruction_ids", "instruction_mask") if name in batch]
        rngs = None if rows is None else {"dropout": key}
        return self.model.apply({"params": trainable}, image_embeds, *instruction, dropout_rows=rows, rngs=rngs)

    def prefix(self, model: Decoder | T5, soft_prompt: jax.Array) -> jax.Array:
        """The beginning of a text as the bound language model knows it, then the soft prompt: float[B, N + Q, D]."""
        begin = jnp.tile(jnp.asarray(self.begin, jnp.int32), (len(soft_prompt), 1))
        embeds = model.embed(begin)
        return jnp.concatenate([embeds, soft_prompt.astype(embeds.dtype)], axis=1)

    def _features(self, model: Decoder | T5, soft_prompt, texts: Texts, rows: jax.Array | None) -> jax.Array:
        """What the head is applied to for each of the targets: float[B, U, D]."""
        keep = rows_of(len(soft_prompt)).keep
        prefix = self.prefix(model, soft_prompt)
        embeds = keep(jnp.concatenate([prefix, model.embed(texts.ids)], axis=1))
        batch, length = embeds.shape[:2]
        if self.reads_apart:
            mask = jnp.concatenate([jnp.ones(prefix.shape[:2], bool), texts.mask], axis=1)
            encoded = model.encode(embeds, mask, rows)
            shifted = jnp.pad(texts.targets[:, :-1], ((0, 0), (1, 0)), constant_values=START)
            hidden, _ = model.decode(encoded, keep(model.embed(shifted)), dropout_rows=rows)
            return keep(hidden)
        # Padding stands at the end, where causality already hides it.
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        hidden, _ = model(embeds, positions, causal_mask(length), dropout_rows=rows)
        # The last query predicts the first token.
        return keep(hidden[:, prefix.shape[1] - 1 : -1])

    def language_loss(
        self, language: params.Tree, soft_prompt: jax.Array, texts: Texts, weights: jax.Array, rows=None, key=None
    ) -> jax.Array:
        """Sum of the losses of the targets, float32[B, U] of weights; with the model's dropout if `rows` are given."""

        def method(model: Decoder | T5) -> jax.Array:
            features = self._features(model, soft_prompt, texts, rows)
            return language_modeling_loss(features, model.head(), None, texts.targets, weights, frozen_head=True)

        rngs = None if rows is None else {"dropout": key}
        return self.language_model.apply({"params": _tables_whole(language)}, method=method, rngs=rngs)

    def _prepared(self, batch: Batch) -> dict:
        """What is to be cut into pieces: the batch, each row's number in it, and each token's weight in its loss."""
        texts, size = self.texts(batch), len(batch["example_mask"])
        ranks = (self.compat.world_size or rows_of(size).shards) if self.compat.rank_token_mean else 1
        rows = jnp.arange(size, dtype=jnp.uint32)
        return batch | {"texts": texts, "weights": token_weights(texts.counts, ranks), "rows": rows}

    def _piece(self, trainable: params.Tree, frozen: params.Tree, piece: dict, key: jax.Array) -> jax.Array:
        """What a piece, rows of `_prepared`, has of the loss of the whole batch."""
        trainable, frozen = lora.assemble(trainable, frozen, self.lora_scale)
        reads, writes = jax.random.split(key)
        rows = rows_of(len(piece["rows"]))
        drops = lambda wanted: piece["rows"] if wanted else None
        embeds = rows.keep(image_embeds(self.encode, trainable, frozen, piece))
        qformer = self.model.config.qformer
        read = drops(qformer.dropout or qformer.attention_dropout)
        soft_prompt = rows.keep(self.soft_prompt(trainable, embeds, piece, read, reads))
        written = drops(self.compat.llm_dropout)
        return self.language_loss(frozen["language"], soft_prompt, piece["texts"], piece["weights"], written, writes)

    def loss(self, trainable: params.Tree, frozen: params.Tree, batch: Batch, key: jax.Array) -> jax.Array:
        """float32[], the batch in one piece; `frozen` has the trees `language` and, where it is needed, `vision`."""
        return self._piece(trainable, frozen, self._prepared(batch), key)

    def value_and_gradients(
        self, trainable: params.Tree, frozen: params.Tree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, params.Tree]:
        """The loss and its gradient by `trainable`, summed over the pieces of the batch.

        Raises:
          ValueError: the batch does not divide into pieces, or into the ranks that are imitated.
        """
        objective = lambda piece: jax.value_and_grad(self._piece)(trainable, frozen, piece, key)
        prepared = self._prepared(batch)
        if self.pieces == 1:
            return objective(prepared)
        add = lambda sums, piece: (jax.tree.map(jnp.add, sums, objective(piece)), None)
        start = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
        rows = rows_of(len(batch["example_mask"]))
        return jax.lax.scan(add, start, jax.tree.map(lambda x: rows.pieces(x, self.pieces), prepared))[0]
