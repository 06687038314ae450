"""Foreign tensors into our parameter trees, by path table.

Other frameworks store a tensor a layer; ours stack the layers that a scan runs over. A row says, for the paths that
match its expression, the foreign name (with {layer} where there is one) and how its axes turn into ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from blip2_jax import params


class Tensors(Protocol):
    """Named arrays, read one at a time."""

    where: str

    def names(self) -> list[str]: ...

    def read(self, name: str) -> np.ndarray: ...


class From(NamedTuple):
    """Attributes:
    name: the foreign tensor; "{layer}" is the number of the layer, "{1}" the expression's first group, and so on.
    convert: foreign array and our shape (of one layer) -> our array.
    """

    name: str
    convert: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def as_is(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return array.reshape(shape)


def transposed(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """torch's Linear keeps [out, in]; ours is [in, out], either of them perhaps split into heads."""
    return array.T.reshape(shape)


def load(
    template: params.Tree,
    table: params.Table[From],
    tensors: Tensors,
    layers_of: Callable[[str], list[int] | int | None],
) -> dict:
    """Fill a tree from foreign tensors.

    Args:
      template: tree of leaves with shape and dtype, every one of which the table must cover.
      table: rows (our path expression, From).
      tensors: where the foreign tensors are.
      layers_of: for a path, the foreign layers stacked along its first axis, a single layer, or None.

    Returns:
      A tree of numpy arrays like `template`.

    Raises:
      ValueError: a foreign tensor is missing, or its shape does not fit.
    """
    rows = params.flatten(
        params.resolve([(pattern, (pattern, source)) for pattern, source in table], template, "import")
    )
    known = set(tensors.names())

    def read(path: str, layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
        pattern, source = rows[path]
        name = source.name.format(*re.fullmatch(pattern, path).groups(), layer=layer)
        if name not in known:
            raise ValueError(f"{tensors.where}: no tensor {name!r}, which {path!r} needs")
        array = tensors.read(name)
        try:
            return source.convert(array, shape)
        except ValueError as error:
            raise ValueError(
                f"{tensors.where}: tensor {name!r} has shape {array.shape}, which does not fit {shape} of {path!r}"
            ) from error

    def leaf(path: str, like) -> np.ndarray:
        layers = layers_of(path)
        if isinstance(layers, list):
            return np.stack([read(path, layer, like.shape[1:]) for layer in layers]).astype(like.dtype)
        return read(path, layers, like.shape).astype(like.dtype)

    return params.map_paths(leaf, template)


class Arrays(Mapping):
    """`Tensors` over a dictionary, for tests and small files."""

    def __init__(self, arrays: Mapping[str, np.ndarray], where: str):
        self._arrays, self.where = dict(arrays), where

    def __getitem__(self, name):
        return self._arrays[name]

    def __iter__(self):
        return iter(self._arrays)

    def __len__(self):
        return len(self._arrays)

    def names(self) -> list[str]:
        return list(self._arrays)

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]
