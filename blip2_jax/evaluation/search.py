"""Which captions are nearest to each image, and which images to each caption, without all similarities at once.

Image features wait in a temporary file, of several processes each with its own rows; they come back batch by batch, and
the devices compare them with the captions block by block, keeping of every query its best candidates alone. So memory
grows by these, and by the captions' features, whatever the number of images.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from blip2_jax.evaluation.batches import Layout
from blip2_jax.evaluation.retrieval import Found
from blip2_jax.monitoring.progress import progress
from blip2_jax.parallel import gathering
from blip2_jax.parallel.rows import rows_of

_BLOCK = 1024  # Captions that are compared at once with a batch of images.


class RowsOnDisk:
    """Arrays of one shape and dtype in a temporary file (in the folder TMPDIR), which goes with this object."""

    def __init__(self):
        self._file = tempfile.TemporaryFile(prefix="blip2_jax_features_")  # noqa: SIM115, closed by `close`.
        self._count, self._like = 0, np.zeros(0)

    def append(self, array: np.ndarray) -> None:
        """One more.

        Raises:
          ValueError: it has another shape or dtype than the first.
          OSError: the disk is full.
        """
        known = self._like
        if self._count and (array.shape, array.dtype) != (known.shape, known.dtype):
            raise ValueError(f"expected an array {known.dtype}{known.shape}, found {array.dtype}{array.shape}")
        self._like = np.empty(array.shape, array.dtype)
        self._file.seek(self._count * self._like.nbytes)
        self._file.write(np.ascontiguousarray(array).view(np.uint8).data)
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[np.ndarray]:
        """In the order in which they were given."""
        for number in range(self._count):
            self._file.seek(number * self._like.nbytes)
            read = self._file.read(self._like.nbytes)
            yield np.frombuffer(read, self._like.dtype).reshape(self._like.shape)

    def close(self) -> None:
        self._file.close()


class _Best(NamedTuple):
    """The best candidates of queries so far, best first: float32[..., K] and int32[..., K]."""

    scores: jax.Array
    index: jax.Array


def _better(best: _Best, scores: jax.Array, index: jax.Array) -> _Best:
    """With further candidates float32[N, M], whose numbers int32[M] are higher; equal scores keep their order."""
    index = jnp.broadcast_to(index, scores.shape)
    both = _Best(jnp.concatenate([best.scores, scores], axis=1), jnp.concatenate([best.index, index], axis=1))
    scores, place = jax.lax.top_k(both.scores, best.scores.shape[1])
    return _Best(scores, jnp.take_along_axis(both.index, place, axis=1))


@functools.partial(jax.jit, static_argnames="keep", donate_argnames="of_texts")
def _compare(images, there, first, texts, real, of_texts: _Best, keep: int) -> tuple[_Best, _Best]:
    """A batch of images against all captions.

    Args:
      images: float32[B, Q, E].
      there: bool[B], the rows that hold an image.
      first: int32[], number of the first row.
      texts: float32[N, C, E], blocks of captions.
      real: bool[N, C], those that are there.
      of_texts: [N, C, K] of the batches before.
      keep: captions of an image.

    Returns:
      The best captions of these images, [B, keep], and the best images of all captions.
    """
    rows = rows_of(len(images))
    images = rows.keep(images)
    numbers = first + jnp.arange(len(images), dtype=jnp.int32)
    start = _Best(jnp.full((len(images), keep), -jnp.inf), jnp.zeros((len(images), keep), jnp.int32))

    def block(best: _Best, given):
        texts, real, of_texts, number = given
        queries = jnp.einsum("iqe,te->iqt", images, texts, precision=jax.lax.Precision.HIGHEST)
        scores = rows.keep(queries.max(1))
        captions = number * len(texts) + jnp.arange(len(texts), dtype=jnp.int32)
        of_texts = _better(of_texts, jnp.where(there, scores.T, -jnp.inf), numbers)
        best = _better(best, jnp.where(real, scores, -jnp.inf), captions)
        return jax.tree.map(rows.keep, best), of_texts

    given = texts, real, of_texts, jnp.arange(len(texts), dtype=jnp.int32)
    return jax.lax.scan(block, start, given)


def search(
    layout: Layout, images: RowsOnDisk, numbers: np.ndarray, texts: np.ndarray, keep: int, block: int = _BLOCK
) -> tuple[Found, Found]:
    """The nearest captions of every image, and the nearest images of every caption, by cosine of the best query.

    All processes of the layout call together, each with the rows of every batch that are its own.

    Args:
      layout: of the batches of images.
      images: float32[b, Q, E] of unit length, of every batch.
      numbers: int[I], which rows of the batches, counted through, hold an image; ascending.
      texts: float32[T, E] of unit length.
      keep: candidates of a query, at most.
      block: captions compared at once.

    Returns:
      Of images [I, min(keep, T)] and of texts [T, min(keep, I)].
    """
    size, count = layout.batch_size, len(texts)
    block = min(block, count)
    blocks = -(-count // block)
    fill = np.pad(texts, ((0, blocks * block - count), (0, 0))).reshape(blocks, block, -1)
    real = (np.arange(blocks * block) < count).reshape(blocks, block)
    shape = (blocks, block, min(keep, len(numbers)))
    fill, real = layout.replicate(fill), layout.replicate(real)
    of_texts = _Best(*map(layout.replicate, (np.full(shape, -np.inf, np.float32), np.zeros(shape, np.int32))))
    there = np.isin(np.arange(len(images) * size), numbers).reshape(-1, size)
    of_images = []
    for number, own in enumerate(progress(images, total=len(images), desc="retrieval", unit="batch", leave=False)):
        batch = layout.place({"images": own, "there": there[number][layout.rows]})
        with jax.set_mesh(layout.mesh):
            first = np.int32(number * size)
            found, of_texts = _compare(batch["images"], batch["there"], first, fill, real, of_texts, min(keep, count))
        of_images.append(gathering.whole(found))
    flat = [np.concatenate(parts)[numbers] for parts in zip(*of_images, strict=True)]
    scores, index = (x.reshape(-1, shape[-1])[:count] for x in gathering.whole(of_texts))
    return Found(*flat), Found(scores, np.searchsorted(numbers, index).astype(np.int32))
