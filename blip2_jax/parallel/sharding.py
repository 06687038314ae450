"""How parameters lie on the mesh, by path table.

A row names mesh axes for the last dimensions of a parameter; those before, such as the axis over layers, are whole on
every device. Heads are split over `tensor` whole or not at all; what is left of a matrix is divided over `fsdp`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from blip2_jax import params

Spec = tuple[str | None, ...]

PARAMETERS: params.Table[Spec] = [
    (r".*image_projection/(key|value)/kernel", ("fsdp", None, "tensor", None)),
    (r".*image_projection/(key|value)/bias", (None, "tensor", None)),
    (r".*qkv/kernel", ("fsdp", None, "tensor", None)),
    (r".*qkv/bias", (None, "tensor", None)),
    (r".*(query|key|value)/kernel", ("fsdp", "tensor", None)),
    (r".*(query|key|value)/bias", ("tensor", None)),
    (r".*_mlp/output/kernel", ("tensor", "fsdp")),
    (r".*output/kernel", ("tensor", None, "fsdp")),
    (r".*(up|gate|intermediate)/kernel", ("fsdp", "tensor")),
    (r".*(up|gate|intermediate)/bias", ("tensor",)),
    (r".*down/kernel", ("tensor", "fsdp")),
    (r".*buckets/embedding", (None, "tensor")),
    (r".*(word_embeddings|embeddings|lm_head)/embedding", ("tensor", "fsdp")),
    (r".*(vision_proj|text_proj|language_projection|lm_head/dense)/kernel", ("fsdp", "tensor")),
    (r".*", ()),
]


def specs(tree: params.Tree, mesh: Mesh | AbstractMesh, table: params.Table[Spec] = PARAMETERS) -> params.Tree:
    """A PartitionSpec at every leaf; a dimension that its mesh axis does not divide is whole on every device."""
    rows = params.resolve(params.relevant(table, tree), tree, "sharding")
    flat = params.flatten(rows)

    def spec(path: str, leaf: Any) -> PartitionSpec:
        row = flat[path]
        named = (None,) * (len(leaf.shape) - len(row)) + row
        fits = lambda axis, size: axis if axis and size % mesh.shape[axis] == 0 else None
        return PartitionSpec(*(fits(axis, size) for axis, size in zip(named, leaf.shape, strict=True)))

    return params.map_paths(spec, tree)


def shardings(tree: params.Tree, mesh: Mesh, table: params.Table[Spec] = PARAMETERS) -> params.Tree:
    """A NamedSharding at every leaf."""
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh, table), is_leaf=is_spec)


def placer(tree: params.Tree, mesh: Mesh, table: params.Table[Spec] = PARAMETERS) -> Callable[[str, Any], jax.Array]:
    """(path, array) -> the array where it belongs; for readers that go through a tree leaf by leaf."""
    places = params.flatten(shardings(tree, mesh, table))
    return lambda path, array: jax.device_put(array, places[path])
