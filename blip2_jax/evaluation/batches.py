"""Evaluation in batches over a mesh that several processes may share: each reads its rows, all know what is found."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from blip2_jax.data.pipeline import Batch, Pictures, evaluation_batches
from blip2_jax.data.records import Record
from blip2_jax.monitoring.progress import progress
from blip2_jax.parallel import gathering, sharding
from blip2_jax.parallel import mesh as meshes

_FACTS = ("key", "caption", "captions", "category")  # Of an example, what metrics and samples are made of.


@dataclasses.dataclass(frozen=True)
class Layout:
    """How batches of B rows lie on a mesh. All processes that share it have to call its methods together.

    Attributes:
      mesh: whose axes data and fsdp divide the rows.
      batch_size: B.

    Raises:
      ValueError: they do not divide B.
    """

    mesh: Mesh
    batch_size: int

    def __post_init__(self):
        meshes.check_batch_size(self.batch_size, self.mesh, name="evaluation.batch_size")

    @property
    def rows(self) -> np.ndarray:
        """int[b], the rows of each batch that this process has to bring."""
        return meshes.own_rows(self.batch_size, self.mesh)

    def place(self, own: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """From the rows of this process, [b, ...], to the batch on the mesh, [B, ...]."""
        return meshes.global_batch(own, self.batch_size, self.mesh)

    def run(self, function: Callable, *inputs: Any) -> Any:
        """What a compiled function gives on the mesh."""
        with jax.set_mesh(self.mesh):
            return function(*inputs)

    def call(self, function: Callable, *inputs: Any) -> Any:
        """What a compiled function gives on the mesh, as whole arrays of numpy in every process."""
        return gathering.whole(self.run(function, *inputs))

    def batches(self, arrays: Mapping[str, np.ndarray], label: str) -> Iterator[dict[str, jax.Array]]:
        """Batches of rows that every process knows, on the mesh.

        Args:
          arrays: [N, ...] each. The last batch is filled up with rows again, for which its `example_mask` is False;
            what is compiled meets nothing that it has not met, and a text that is written there ends.
          label: of the progress bar.
        """
        size, rows, count = self.batch_size, self.rows, len(next(iter(arrays.values())))
        arrays = {**arrays, "example_mask": np.ones(count, bool)}
        for start in progress(range(0, count, size), desc=label, unit="batch", leave=False):
            parts = {name: array[start : start + size] for name, array in arrays.items()}
            there = len(parts["example_mask"])
            filled = {name: part[np.arange(size) % there] for name, part in parts.items()}
            filled["example_mask"] &= np.arange(size) < there
            yield self.place({name: array[rows] for name, array in filled.items()})

    def replicate(self, array: np.ndarray) -> jax.Array:
        """What every process knows, whole on every device."""
        return sharding.put(array, meshes.replicated(self.mesh))

    def own(self, array: jax.Array) -> np.ndarray:
        """Of a batch [B, ...] on the mesh the rows of this process, [b, ...]: those that `place` takes."""
        array = _laid(meshes.batch_sharding(self.mesh))(array)
        parts = {part.index[0].start or 0: part.data for part in array.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


@functools.cache
def _laid(place: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """Puts what lies on a mesh in some way there in another; under jit, since it may be that of several processes."""
    return jax.jit(lambda x: x, out_shardings=place)


def in_batches(
    layout: Layout, function: Callable[..., jax.Array], arrays: Sequence[np.ndarray], label: str
) -> np.ndarray:
    """`function` of all rows of `arrays`, batch by batch.

    Args:
      layout: of the batches.
      function: compiled, arrays [B, ...] to an array [B, ...].
      arrays: [N, ...] each, the same in every process.
      label: of the progress bar.

    Returns:
      [N, ...], in every process.
    """
    fields = {str(number): array for number, array in enumerate(arrays)}
    results = []
    for batch in layout.batches(fields, label):
        results.append(layout.call(function, *(batch[name] for name in fields)))
    return np.concatenate(results)[: len(arrays[0])]


class Reading:
    """A pass over a source, in which each process reads its own rows; afterwards all know of all records.

    Attributes:
      examples: after the pass, what is known of the records that could be used: `key`, `caption`, all `captions` and,
        where there is one, `category`.
      numbers: int[N], after the pass, which records these are.
    """

    examples: list[Record]
    numbers: np.ndarray

    def __init__(self, layout: Layout, pictures: Pictures, collate: Callable[[Sequence[Record]], Batch]):
        self._layout, self._pictures, self._collate = layout, pictures, collate

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, jax.Array]]]:
        """The rows of this process [b, ...], and the batch on the mesh [B, ...]."""
        layout, known = self._layout, {}
        read = evaluation_batches(self._pictures, self._collate, layout.batch_size, layout.rows)
        for batch_number, (found, own) in enumerate(read):
            yield own, layout.place(own)
            numbers = batch_number * layout.batch_size + layout.rows
            for number, one in zip(numbers.tolist(), found, strict=True):
                if one is not None:
                    usable = isinstance(one, dict)
                    known[number] = {name: one[name] for name in _FACTS if name in one} if usable else str(one)
        self._bring_together(known)

    def _bring_together(self, known: dict[int, dict | str]) -> None:
        """What processes know of their records, or why one cannot be used, which is told on stderr."""
        together: dict[int, dict | str] = {}
        for one in gathering.of_all_processes(known):
            together |= one
        ordered = sorted(together.items())
        for _, reason in ordered:
            if isinstance(reason, str):
                print(f"left out of {self._pictures.name}: {reason}", file=sys.stderr)
        usable = [(number, facts) for number, facts in ordered if isinstance(facts, dict)]
        if not usable:
            raise ValueError(f"{self._pictures.name} holds no record that can be used")
        self.numbers = np.asarray([number for number, _ in usable])
        self.examples = [facts for _, facts in usable]

    def of_examples(self, batches: Sequence[np.ndarray]) -> np.ndarray:
        """What was found of all batches, [B, ...] each -> of the records that could be used, [N, ...]."""
        return np.concatenate(batches)[self.numbers]
