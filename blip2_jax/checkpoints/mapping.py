"""Foreign tensors and our parameter trees, in both directions, by path table.

Other frameworks store a tensor a layer; ours stack the layers that a scan runs over. A row of a table says, for the
paths that match its expression, where the foreign tensors are and how their axes turn into ours::

    (r"layers/(gate|up|down)/kernel", Foreign("model.layers.{layer}.mlp.{0}_proj.weight", linear()))
"""

from __future__ import annotations

import collections
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from blip2_jax import params
from blip2_jax.monitoring.progress import progress

Shape = tuple[int, ...]


class Tensors(Protocol):
    """Named arrays, read one at a time."""

    where: str

    def names(self) -> Sequence[str]: ...

    def read(self, name: str) -> np.ndarray: ...


class Layout(NamedTuple):
    """How the axes of a foreign tensor turn into ours.

    Attributes:
      foreign_shape: our shape -> the foreign one.
      to_ours: foreign array of that shape, and our shape -> our array.
      to_foreign: our array -> foreign array.
    """

    foreign_shape: Callable[[Shape], Shape]
    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_foreign: Callable[[np.ndarray], np.ndarray]


def _size(shape: Shape) -> int:
    return int(np.prod(shape))


def as_is() -> Layout:
    return Layout(lambda shape: shape, lambda array, _: array, lambda array: array)


def flat() -> Layout:
    """One foreign axis where we have several, such as the heads of a bias."""
    return Layout(lambda shape: (_size(shape),), lambda array, shape: array.reshape(shape), lambda array: array.ravel())


def leading(count: int = 1) -> Layout:
    """The foreign tensor has `count` more axes of length 1 at its front."""
    ones = (1,) * count
    return Layout(
        lambda shape: ones + shape,
        lambda array, shape: array.reshape(shape),
        lambda array: array.reshape(ones + array.shape),
    )


def linear(inputs: int = 1) -> Layout:
    """PyTorch's Linear keeps [out, in]; ours is [in, out], the first `inputs` of its axes being the input."""
    return Layout(
        lambda shape: (_size(shape[inputs:]), _size(shape[:inputs])),
        lambda array, shape: array.T.reshape(shape),
        lambda array: array.reshape(_size(array.shape[:inputs]), -1).T,
    )


def convolution() -> Layout:
    """PyTorch's [out, in, height, width]; ours is [height, width, in, out]."""
    return Layout(
        lambda shape: (shape[3], shape[2], shape[0], shape[1]),
        lambda array, _: array.transpose(2, 3, 1, 0),
        lambda array: array.transpose(3, 2, 0, 1),
    )


class Foreign(NamedTuple):
    """A row's value: the foreign tensors that one of our parameters is made of.

    Attributes:
      name: "{layer}" is the number of the layer, "{0}" the expression's first group, and so on. Several names are
        pieces that lie side by side on axis `pieces` of ours; None is a piece that the other side does not have, zero.
      layout: of each tensor.
      stacked: our axis over layers, where there is one.
      pieces: our axis over pieces, counted without the axis over layers.
    """

    name: str | tuple[str | None, ...]
    layout: Layout
    stacked: int = 0
    pieces: int = 0


class Piece(NamedTuple):
    """One foreign tensor and its place in one of our parameters.

    Attributes:
      name: of the foreign tensor; None where the other side has none.
      index: which part of our array it is.
      shape: of that part.
      layout: how its axes turn.
    """

    name: str | None
    index: tuple[int | slice, ...]
    shape: Shape
    layout: Layout

    @property
    def foreign_shape(self) -> Shape:
        return self.layout.foreign_shape(self.shape)


def template(init: Callable[[jax.Array], params.Tree], dtype: Any = None) -> params.Tree:
    """The tree that `init` makes from a key, as shapes, of another dtype if one is given."""
    tree = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), tree)


# For a path, the foreign layers stacked along an axis, a single layer, or None.
LayersOf = Callable[[str], Sequence[int] | int | None]
Mapped = dict[str, list[Piece]]


def resolve(template: params.Tree, table: params.Table[Foreign], layers_of: LayersOf, prefix: str = "") -> Mapped:
    """The pieces that each parameter of a tree is made of, by path.

    Args:
      template: tree of leaves with a shape, every one of which the table must cover.
      table: rows (our path expression, Foreign).
      layers_of: the layers of a path.
      prefix: stands before every foreign name.
    """
    numbered = [(pattern, (pattern, source)) for pattern, source in table]
    rows = params.flatten(params.resolve(numbered, template, "checkpoint"))
    return {
        path: list(_pieces(path, leaf.shape, *rows[path], layers_of(path), prefix))
        for path, leaf in params.flatten(template).items()
    }


def _pieces(path, shape: Shape, pattern: str, source: Foreign, layers, prefix: str) -> Iterator[Piece]:
    groups = re.fullmatch(pattern, path).groups()
    names = source.name if isinstance(source.name, tuple) else (source.name,)
    stacked = layers is not None and not isinstance(layers, int)
    for place, layer in enumerate(layers if stacked else [layers]):
        index: list[int | slice] = [slice(None)] * len(shape)
        rest = list(range(len(shape)))
        if stacked:
            index[rest.pop(source.stacked)] = place
        for number, name in enumerate(names):
            if isinstance(source.name, tuple):
                index[rest[source.pieces]] = number
            own = tuple(size for size, at in zip(shape, index, strict=True) if isinstance(at, slice))
            foreign = None if name is None else prefix + name.format(*groups, layer=layer)
            yield Piece(foreign, tuple(index), own, source.layout)


def names(mapped: Mapped) -> dict[str, Shape]:
    """Every foreign tensor with its shape."""
    return {piece.name: piece.foreign_shape for pieces in mapped.values() for piece in pieces if piece.name}


# What becomes of a finished leaf: its path and its numpy array -> what is kept of it.
Put = Callable[[str, np.ndarray], Any]


def to_device(path: str, array: np.ndarray) -> jax.Array:
    """A leaf on the default device."""
    return jnp.asarray(array)


def load(template: params.Tree, mapped: Mapped, tensors: Tensors, put: Put = lambda path, array: array) -> dict:
    """Fill a tree from foreign tensors, one leaf after another, so that little more than a leaf waits in memory.

    Args:
      template: tree of leaves with shape and dtype.
      mapped: of `resolve`.
      tensors: where the foreign tensors are.
      put: what becomes of a finished numpy array, such as its way to the devices.

    Raises:
      ValueError: a foreign tensor is missing, or its shape does not fit.
    """
    known = set(tensors.names())
    leaves = params.flatten(template)
    filled = {}
    options = {"unit": "B", "unit_scale": True, "leave": False}
    with progress(total=params.size(template), desc=f"reading {tensors.where}", **options) as bar:
        for path, like in leaves.items():
            array = np.zeros(like.shape, like.dtype)
            for piece in mapped[path]:
                if piece.name is not None:
                    array[piece.index] = _read(tensors, known, piece, path)
            bar.update(array.nbytes)
            filled[path] = put(path, array)
            del array
    return params.unflatten(filled)


def _read(tensors: Tensors, known: set[str], piece: Piece, path: str) -> np.ndarray:
    if piece.name not in known:
        raise ValueError(f"{tensors.where}: no tensor {piece.name!r}, which {path!r} needs")
    array = tensors.read(piece.name)
    if array.shape != piece.foreign_shape:
        raise ValueError(
            f"{tensors.where}: tensor {piece.name!r} has shape {array.shape}, but {path!r} needs {piece.foreign_shape}"
        )
    return piece.layout.to_ours(array, piece.shape)


def export(tree: params.Tree, mapped: Mapped) -> Iterator[tuple[str, np.ndarray]]:
    """The foreign tensors of a tree, name and array, one after another; the inverse of `load`."""
    for path, leaf in params.flatten(tree).items():
        array = np.asarray(leaf)
        for piece in mapped[path]:
            if piece.name is not None:
                yield piece.name, np.asarray(piece.layout.to_foreign(array[piece.index]), order="C")


class Report(NamedTuple):
    """What a file has beside what a model needs.

    Attributes:
      loaded: tensors that were read.
      expected: tensors that were left aside, with the reason.
      unexpected: tensors that nothing needs and no reason covers.
      missing: tensors that are needed and not there.
    """

    loaded: list[str]
    expected: dict[str, str]
    unexpected: list[str]
    missing: list[str]

    def tell(self, where: str) -> None:
        """Print it to stderr, a line each, long lists cut."""
        reasons = collections.Counter(self.expected.values())
        aside = "; ".join(f"{count} left aside ({reason})" for reason, count in reasons.items())
        print(f"{where}: {len(self.loaded)} tensors read{'; ' if aside else ''}{aside}", file=sys.stderr)
        for title, names in (("NOT EXPECTED, and left aside", self.unexpected), ("not there", self.missing)):
            if names:
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                print(f"  {title}: {', '.join(names[:8])}{more}", file=sys.stderr)


def account(found: Sequence[str], needed: Mapping[str, Shape], aside: params.Table[str]) -> Report:
    """Compare the tensors of a file with those of a mapping; `aside` says of names why they may be left."""
    reasons = {
        name: next((reason for pattern, reason in aside if re.fullmatch(pattern, name)), None)
        for name in found
        if name not in needed
    }
    return Report(
        [name for name in found if name in needed],
        {name: reason for name, reason in reasons.items() if reason},
        [name for name, reason in reasons.items() if not reason],
        [name for name in needed if name not in set(found)],
    )
