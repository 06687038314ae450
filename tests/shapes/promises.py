"""What functions promise of shapes and dtypes, written as their docstrings have it: float32[B, Q, E].

A table of promises has a line a function: what goes in and what comes out. A promise calls the function that it names,
so no line can speak of another. What goes in are arrays, by their shapes, and anything else as it is; a `Late` input
is made from the folder of tiny models when it is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, PartitionSpec

from blip2_jax.parallel.mesh import abstract_mesh
from blip2_jax.parallel.rows import Rows


class Kind:
    """A dtype, of which `[...]` makes an array without values."""

    def __init__(self, dtype: Any):
        self._dtype = dtype

    def __getitem__(self, shape: int | tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape if isinstance(shape, tuple) else (shape,), self._dtype)


float16, float32, float64, bfloat16 = map(Kind, (np.float16, np.float32, np.float64, jnp.bfloat16))
int32, int64, uint8, uint32, bool_ = map(Kind, (np.int32, np.int64, np.uint8, np.uint32, np.bool_))
KEY = jax.eval_shape(jax.random.key, 0)

# Of devices that need not be there: nothing but shapes lies on it.
MESH = abstract_mesh("data=2,fsdp=2,tensor=2", 8)
ROWS = Rows(MESH, ("data", "fsdp"))
HERE, EVERYWHERE = (None,), (None, MESH)


@dataclasses.dataclass(frozen=True)
class Late:
    """An input, or a result, that is made when it is needed, from the folder of tiny models."""

    make: Callable[[pathlib.Path], Any]

    def then(self, function: Callable) -> Late:
        """What a function makes of it."""
        return Late(lambda folder: function(self.make(folder)))


@dataclasses.dataclass(frozen=True)
class Promise:
    """What a function gives.

    Attributes:
      function: as it stands in its module or class; a method's `self` is the first input.
      inputs, options: what it is called with, by position and by name.
      gives: a tree of arrays without values, and of types for what is no array.
      find: (call, inputs and options) -> such a tree.
      meshes: under each of which it is found; None is no mesh.
      then: what is looked at of the result, such as what it gives if it is a function itself.
    """

    function: Callable
    inputs: tuple
    options: dict[str, Any]
    gives: Any
    find: Callable[[Callable, Any], Any]
    meshes: tuple[AbstractMesh | None, ...]
    then: Callable[[Any], Any]

    def __str__(self) -> str:
        return name_of(self.function)

    def found(self, folder: pathlib.Path, mesh: AbstractMesh | None) -> Any:
        """What the function gives under a mesh, as `gives` has it."""
        given = made((self.inputs, self.options), folder)
        with jax.sharding.use_abstract_mesh(mesh) if mesh else contextlib.nullcontext():
            return self.find(lambda given: self.then(_called(self.function, *given)), given)


def name_of(function: Callable) -> str:
    """As it is imported from blip2_jax."""
    return f"{function.__module__}.{function.__qualname__}".removeprefix("blip2_jax.")


def made(tree: Any, folder: pathlib.Path) -> Any:
    """The tree with what is late."""
    return jax.tree.map(lambda leaf: leaf.make(folder) if isinstance(leaf, Late) else leaf, tree)


def _called(function: Callable, inputs: tuple, options: dict[str, Any]) -> Any:
    """What a function gives; a Flax module among its inputs is bound to fresh parameters."""
    module = next((x for x in inputs if isinstance(x, nn.Module)), None)
    if module is None:
        return function(*inputs, **options)
    method = lambda bound: function(*(bound if x is module else x for x in inputs), **options)
    key = jax.random.key(0)
    return module.init_with_output({"params": key, "dropout": key}, method=method)[0]


def kinds(tree: Any) -> Any:
    """Arrays without their values, and the types of all else."""
    kind = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else type(leaf)
    return jax.tree.map(kind, tree)


def _is_empty(leaf: Any) -> bool:
    """Whether it is an array without values."""
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _trace(call: Callable, given: Any, place: Callable[[Callable], Callable] = lambda function: function) -> Any:
    """By shapes alone: nothing is computed."""
    leaves, structure = jax.tree.flatten(given)
    found = []

    def function(*arrays: jax.Array) -> None:
        arrays = iter(arrays)
        filled = [next(arrays) if _is_empty(leaf) else leaf for leaf in leaves]
        found.append(kinds(call(jax.tree.unflatten(structure, filled))))

    jax.eval_shape(place(function), *filter(_is_empty, leaves))
    return found[0]


def _trace_on_a_device(call: Callable, given: Any) -> Any:
    """What one of the devices of the mesh gives that run it together, each with inputs of these shapes."""
    whole = PartitionSpec()
    place = lambda function: jax.shard_map(function, mesh=MESH, in_specs=whole, out_specs=None, check_vma=False)
    return _trace(call, given, place)


def _run(call: Callable, given: Any) -> Any:
    """On normal numbers, or zeros and ones where they are whole; what comes out must be finite."""
    rng = np.random.default_rng(0)

    def values(leaf: Any) -> Any:
        if not _is_empty(leaf):
            return leaf
        real = jnp.issubdtype(leaf.dtype, jnp.floating)
        return (rng.normal(size=leaf.shape) if real else rng.integers(0, 2, leaf.shape)).astype(leaf.dtype)

    result = call(jax.tree.map(values, given))
    arrays = [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, np.ndarray | np.generic | jax.Array)]
    chex.assert_tree_all_finite([array for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)])
    return kinds(result)


def _whole(result: Any) -> Any:
    return result


def traced(function: Callable, *inputs, gives, on=EVERYWHERE, then=_whole, **options) -> Promise:
    """A promise of what jax traces."""
    return Promise(function, inputs, options, gives, _trace, on, then)


def on_a_device(function: Callable, *inputs, gives, **options) -> Promise:
    """A promise of what devices run together, on the rows of each."""
    return Promise(function, inputs, options, gives, _trace_on_a_device, (MESH,), _whole)


def ran(function: Callable, *inputs, gives, then=_whole, **options) -> Promise:
    """A promise of what computes with numpy, or with files."""
    return Promise(function, inputs, options, gives, _run, HERE, then)
