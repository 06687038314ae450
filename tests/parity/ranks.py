"""Gradients of one LAVIS process before DistributedDataParallel averages them, from our loss of all processes' batch.

What a process differentiates is the loss of its own rows, which is their share of our loss, the mean of the processes',
times their number. Where LAVIS gathers image tokens, though, the backward pass adds the gradients of all processes at
the image's owner: what an image meets before (`ln_vision`, a trained encoder) has the gradient of all losses by the
process's own images.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from blip2_jax import params
from blip2_jax.data.pipeline import Batch
from blip2_jax.models.layers import KeyValue
from blip2_jax.tasks.encoding import Encode
from blip2_jax.tasks.stage1_loss import Reading, RowTerms, Stage1Loss, Work

_BEFORE_GATHERING = ("ln_vision", "vision")


def gradient(loss: Stage1Loss, inputs: tuple, rank: jax.Array, ranks: int) -> params.Tree:
    """Gradient of a process's loss before averaging, by `trainable`, the first of the inputs.

    Args:
      loss: with LAVIS's switches and one piece.
      inputs: arguments of `Stage1Loss.loss`, with the batch of all processes.
      rank: int32[], the process.
      ranks: how many processes share the batch evenly.
    """
    rows = len(inputs[2]["text_ids"]) // ranks
    values = {field.name: getattr(loss, field.name) for field in dataclasses.fields(loss)}
    own = {"rank": rank, "rows": rows}
    parts = _OwnRows(**values, **own), _OwnImages(**values | {"encode": _numbered(loss.encode)}, **own)
    by_rows, by_images = (
        jax.grad(lambda trainable, part=part: part.loss(trainable, *inputs[1:])[0])(inputs[0]) for part in parts
    )
    found = by_rows | {name: by_images[name] for name in _BEFORE_GATHERING if name in by_images}
    return jax.tree.map(lambda x: ranks * x, found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Share(Stage1Loss):
    """The loss with a part of its gradient, that of one process out of several with `rows` rows each."""

    rank: jax.Array
    rows: int

    def _own(self, row: jax.Array) -> jax.Array:
        """bool[B] by the number of a row."""
        return row.astype(jnp.int32) // self.rows == self.rank


class _OwnRows(_Share):
    """The gradient of the rows' losses."""

    def _row_terms(self, trainable: params.Tree, read: Reading, work: Work, key: jax.Array) -> RowTerms:
        weigh = lambda weights, own: jax.tree.map(lambda weight: weight * own[:, None], weights)
        weighed = lambda part: part | {"weights": weigh(part["weights"], self._own(part["row"]))}
        work = work._replace(match=weighed(work.match), generate=weighed(work.generate))
        return super()._row_terms(trainable, read, work, key)

    def _compare(self, image_features, text_features, temperature, batch: Batch) -> jax.Array:
        """Candidates have no gradient here, so a row has one only through its features over the temperature."""
        own, fixed = self._own(batch["row"]), jax.lax.stop_gradient(temperature)
        scale = fixed / temperature  # 1, with the gradient of the temperature's part in the row.
        image_features = _cut(image_features * scale, own[:, None, None])
        return super()._compare(image_features, _cut(text_features * scale, own[:, None]), fixed, batch)


class _OwnImages(_Share):
    """The gradient by the images, whoever uses them; an image takes the number of its row along, as one more token."""

    def _project(self, trainable: params.Tree, embeds: jax.Array) -> KeyValue:
        own = self._own(embeds[:, -1, 0])
        projected = super()._project(trainable, embeds[:, :-1])
        return jax.tree.map(lambda x: _cut(x, own[None, :, None, None, None]), projected)


def _numbered(encode: Encode) -> Encode:
    """The encoder, with the number of its row behind an image's tokens."""

    def encode_and_number(parameters: params.Tree, image: jax.Array) -> jax.Array:
        embeds = encode(parameters, image)
        number = jnp.arange(len(embeds), dtype=embeds.dtype)[:, None, None]
        return jnp.concatenate([embeds, jnp.broadcast_to(number, embeds[:, :1].shape)], axis=1)

    return encode_and_number


def _cut(x: jax.Array, own: jax.Array) -> jax.Array:
    """x, with no gradient but its own part's."""
    return jnp.where(own, x, jax.lax.stop_gradient(x))
