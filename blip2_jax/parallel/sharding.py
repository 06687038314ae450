"""How parameters lie on the mesh, by path table.

A row names mesh axes for the last dimensions of a parameter; those before, such as the axis over layers, are whole on
every device. Heads are split over `tensor` whole or not at all; what is left of a matrix is divided over `fsdp`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
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
    # Adapters lie as the kernels beside them; their rank is whole on every device.
    (r".*_mlp/output/lora_a", ("tensor", None)),
    (r".*output/lora_a", ("tensor", None, None)),
    (r".*down/lora_a", ("tensor", None)),
    (r".*lora_a", ("fsdp", None)),
    (r".*image_projection/(key|value)/lora_b", (None, None, "tensor", None)),
    (r".*(query|key|value)/lora_b", (None, "tensor", None)),
    (r".*(output|down)/lora_b", (None, "fsdp")),
    (r".*lora_b", (None, "tensor")),
    # Whole on every device: what is small, and what reads pixels, its channels being few.
    (r".*/(scale|bias)", ()),
    (r"(.*/)?(query_tokens|positions|class_token|temperature)", ()),
    (r".*itm_head/kernel", ()),
    (r"(.*/)?(patch_embedding|stem|depthwise|expand|project)/kernel", ()),
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


def state_shardings(state: Any, mesh: Mesh, sharded: bool = True, table: params.Table[Spec] = PARAMETERS) -> Any:
    """A NamedSharding at every leaf of a training state, such as `checkpoints.store.TrainState`.

    What the optimizer keeps of a parameter, its moments among it, lies like the parameter; counts and keys are whole on
    every device.

    Args:
      state: has the parameters as `state.trainable`; arrays or their shapes.
      mesh: that everything lies on.
      sharded: False puts the whole state on every device.
      table: of the parameters.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    places = params.flatten(shardings(state.trainable, mesh, table)) if sharded else {}
    shapes = {path: leaf.shape for path, leaf in params.flatten(state.trainable).items()}

    def place(keys: tuple, leaf: Any) -> NamedSharding:
        names = jax.tree_util.keystr(keys, simple=True, separator="/").split("/")
        ends = ("/".join(names[start:]) for start in range(len(names)))  # The longest first.
        path = next((end for end in ends if end in places), None)
        return places[path] if path and shapes[path] == leaf.shape else whole

    return jax.tree_util.tree_map_with_path(place, state)


def put(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process has whole, placed on all their devices without a word between them."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def placer(tree: params.Tree, mesh: Mesh, table: params.Table[Spec] = PARAMETERS) -> Callable[[str, Any], jax.Array]:
    """(path, array) -> the array where it belongs; for readers that go through a tree leaf by leaf."""
    places = params.flatten(shardings(tree, mesh, table))
    return lambda path, array: put(array, places[path])
