"""Paths and path tables: one language to say, of every parameter, what holds for it.

A table is a list of (regular expression, value). A leaf takes the value of the first row whose expression matches its
whole path, such as "qformer/transformer/groups/layer_0/attention/query/kernel". A leaf without a row is an error, and
so is a row that no leaf needs: tables cannot silently fall behind the model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

Value = TypeVar("Value")
Tree = dict[str, Any]
Table = Sequence[tuple[str, Value]]


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries to {"a/b/c": leaf}, in order."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{path}": leaf for path, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def resolve(table: Table[Value], tree: Tree, name: str) -> dict[str, Any]:
    """A tree like `tree` whose leaves are the values that `table` gives them.

    Args:
      table: the rows.
      tree: of arrays or anything else; only its paths count.
      name: what the table decides, for error messages.

    Raises:
      ValueError: a leaf matches no row, or a row is the first match of no leaf.
    """
    values, used = {}, set()
    for path in flatten(tree):
        row = next((i for i, (pattern, _) in enumerate(table) if re.fullmatch(pattern, path)), None)
        if row is None:
            raise ValueError(f"{name} table: no row matches the parameter {path!r}; add one")
        used.add(row)
        values[path] = table[row][1]
    idle = [pattern for i, (pattern, _) in enumerate(table) if i not in used]
    if idle:
        raise ValueError(f"{name} table: no parameter needs the rows {idle}; remove or correct them")
    return unflatten(values)


def relevant(table: Table[Value], tree: Tree) -> Table[Value]:
    """The rows of a general table that are the first match of some parameter of this tree."""
    firsts = {
        next((number for number, (pattern, _) in enumerate(table) if re.fullmatch(pattern, path)), None)
        for path in flatten(tree)
    }
    return [row for number, row in enumerate(table) if number in firsts]


def map_paths(function: Callable[[str, Any], Any], tree: Tree) -> dict[str, Any]:
    """`function(path, leaf)` at every leaf."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def count(tree: Any) -> int:
    """Number of scalars in all leaves."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def size(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def sha256(tree: Tree) -> str:
    """Of the path, shape, dtype and bytes of every leaf: the same for the same parameters, wherever they lie."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(tree).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.shape} {array.dtype}\0".encode())
        digest.update(array.view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def describe(tree: Tree, columns: Mapping[str, Tree]) -> str:
    """A text table of every leaf (path, shape, dtype and the values of `columns`), with the sum below it."""
    flat = flatten(tree)
    extra = {title: flatten(values) for title, values in columns.items()}
    rows = [("parameter", "shape", "dtype", *extra)]
    for path, leaf in flat.items():
        shape = "x".join(map(str, leaf.shape)) or "scalar"
        rows.append((path, shape, str(np.dtype(leaf.dtype)), *(str(values[path]) for values in extra.values())))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"{count(tree):,} parameters, {size(tree) / 2**20:,.1f} MiB"])
