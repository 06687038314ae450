"""Low-rank adaptation (LoRA, arXiv 2106.09685): a frozen kernel W learns as W + alpha / rank * A B.

A parameter tree carries its adapters with it: `lora_a` and `lora_b` stand beside `kernel`, and `layers.Dense` and
`layers.DenseGeneral` add what they find there. So whoever applies a model to the tree applies the adapters; models,
scans and decoding loops know nothing of them. Of kernels that are stacked over layers the adapters are, too.

    trainable["lora"]["language"]  --attach-->  frozen["language"]    the language model
    trainable["lora"]["qformer"]   --attach-->  frozen["qformer"]     the Q-Former, whose own weights do not learn then
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from blip2_jax import params
from blip2_jax.models.layers import Dense, DenseGeneral

PARTS = ("language", "qformer")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The block `config.lora`.

    Attributes:
      rank: inner width of A B; 0: nothing is adapted.
      alpha: A B is multiplied by alpha / rank.
      language: which matrices of the language model are adapted, an expression that matches their whole paths, such as
        ".*/(query|value)"; "": none. `convert inspect` prints the paths.
      qformer: the same of the Q-Former, whose own weights, those of config.init, then stay as they are.
      multiplier: of the learning rate of adapters.
    """

    rank: int = 0
    alpha: float = 16.0
    language: str = ""
    qformer: str = ""
    multiplier: float = 1.0

    @property
    def targets(self) -> dict[str, str]:
        """The expressions of the parts that are adapted."""
        return {part: getattr(self, part) for part in PARTS if self.rank and getattr(self, part)}

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank if self.rank else 0.0

    def of(self, part: str) -> str:
        """What is adapted in a part, for people."""
        if part not in self.targets:
            return "none"
        return f"rank {self.rank}, alpha {self.alpha:g}, on {self.targets[part]!r}"


def block() -> ml_collections.ConfigDict:
    """The block of a recipe: nothing is adapted."""
    return ml_collections.ConfigDict(dataclasses.asdict(Settings()))


def resolve(config: ml_collections.ConfigDict, parts: tuple[str, ...] = PARTS) -> Settings:
    """What a block says.

    Args:
      config: the block.
      parts: of the model, which can be adapted.

    Raises:
      ValueError: a number out of its range, no regular expression, or settings that contradict each other.
    """
    found = Settings(**config)
    expected = {
        "rank": (found.rank >= 0, "at least 1, or 0 to adapt nothing"),
        "alpha": (0 < found.alpha < math.inf, "a number above 0"),
        "multiplier": (0 <= found.multiplier < math.inf, "at least 0"),
    }
    for name, (holds, what) in expected.items():
        if not holds:
            raise ValueError(f"lora.{name} = {getattr(found, name)!r}: expected {what}")
    named = {part: getattr(found, part) for part in PARTS if getattr(found, part)}
    for part, pattern in named.items():
        if part not in parts:
            raise ValueError(f"lora.{part} = {pattern!r}, but this task has no such part; set lora.{part}=''")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"lora.{part} = {pattern!r} is no regular expression: {error}") from None
    if bool(named) != bool(found.rank):
        mend = "name targets, such as lora.language='.*/(query|value)'" if found.rank else "set lora.rank, such as 8"
        what = "nothing to adapt" if found.rank else f"lora.{next(iter(named))} = {next(iter(named.values()))!r}"
        raise ValueError(f"lora.rank = {found.rank} with {what}: {mend}")
    return found


def check_same(ours: Settings, theirs: Settings, where: str) -> None:
    """Refuse to go on from adapters that are not those of this run; parts without adapters there begin fresh.

    Raises:
      ValueError: another rank, alpha or other targets.
    """
    for part in theirs.targets:
        if ours.of(part) != theirs.of(part):
            raise ValueError(
                f"{where} has a LoRA of the {part} of {theirs.of(part)}; this run's is: {ours.of(part)}. Set "
                "config.lora as there, or start from merged weights (python -m blip2_jax.convert export)"
            )


class Matrix(NamedTuple):
    """A kernel that can be adapted: how many of its last axes are inputs, and then outputs."""

    inputs: int
    outputs: int


class Adaptable(NamedTuple):
    """A part of a model.

    Attributes:
      shapes: its parameters, without their values.
      matrices: those that can be adapted, by path.
    """

    shapes: params.Tree
    matrices: dict[str, Matrix]


def adaptable(initialize: Callable[[jax.Array], params.Tree], inside: str = "") -> Adaptable:
    """What can be adapted of a model.

    Args:
      initialize: makes its parameters from a key.
      inside: only what is under this name.
    """
    matrices: dict[str, Matrix] = {}
    prefix = f"{inside}/" if inside else ""

    def look(call, arguments, options, context):
        module, path = context.module, "/".join(context.module.path)
        if isinstance(module, Dense | DenseGeneral) and path.startswith(prefix):
            count = lambda value: 1 if isinstance(value, int) else len(value)
            inputs = count(module.axis) if isinstance(module, DenseGeneral) else 1
            matrices[path.removeprefix(prefix)] = Matrix(inputs, count(module.features))
        return call(*arguments, **options)

    with nn.intercept_methods(look):
        # A function of its own, since one that was traced before would not be traced again.
        shapes = jax.eval_shape(lambda key: initialize(key), jax.random.key(0))
    return Adaptable(shapes[inside] if inside else shapes, matrices)


def fresh(key: jax.Array, part: str, base: Adaptable, settings: Settings) -> params.Tree:
    """Adapters of one part as they begin: A of He's uniform distribution (as peft), B zero, so that nothing changes.

    Raises:
      ValueError: nothing matches the expression, or a matrix is no larger than the rank.
    """
    pattern, flat, leaves = settings.targets[part], params.flatten(base.shapes), {}
    for path, matrix in sorted(base.matrices.items()):
        if not re.fullmatch(pattern, path):
            continue
        shape = flat[f"{path}/kernel"].shape
        stack = shape[: len(shape) - matrix.inputs - matrix.outputs]
        inputs, outputs = shape[len(stack) : len(shape) - matrix.outputs], shape[len(shape) - matrix.outputs :]
        if settings.rank > min(math.prod(inputs), math.prod(outputs)):
            raise ValueError(
                f"lora.rank = {settings.rank}, but the {part}'s {path} is a matrix of {math.prod(inputs)} x "
                f"{math.prod(outputs)}: choose a smaller rank, or other targets than {pattern!r}"
            )
        # By path, so that the start of one adapter does not depend on what else is adapted.
        own, bound = jax.random.fold_in(key, zlib.crc32(f"{part}/{path}".encode())), math.prod(inputs) ** -0.5
        leaves[f"{path}/lora_a"] = jax.random.uniform(
            own, (*stack, *inputs, settings.rank), minval=-bound, maxval=bound
        )
        leaves[f"{path}/lora_b"] = jnp.zeros((*stack, settings.rank, *outputs))
    if not leaves:
        shown = ", ".join(list(base.matrices)[:8]) + (", ..." if len(base.matrices) > 8 else "")
        raise ValueError(f"lora.{part} = {pattern!r} matches no matrix; there are {shown}")
    return params.unflatten(leaves)


def attach(base: params.Tree, adapters: params.Tree, scale: float) -> params.Tree:
    """The tree with its adapters in it, their scale included; nothing is copied but the small B."""
    scaled = params.map_paths(lambda path, leaf: leaf * scale if path.endswith("/lora_b") else leaf, adapters)
    return params.unflatten(params.flatten(base) | params.flatten(scaled))


def assemble(
    trainable: params.Tree, frozen: Mapping[str, params.Tree], scale: float
) -> tuple[params.Tree, dict[str, params.Tree]]:
    """The same trees as the models are applied to: the Q-Former among the trainable, adapters where they belong.

    Args:
      trainable: with adapters under "lora", or without; then both come back as they are.
      frozen: `language` and `qformer`, where they have adapters.
      scale: of `Settings`.
    """
    trainable, frozen = dict(trainable), dict(frozen)
    adapters = trainable.pop("lora", {})
    if "qformer" in adapters:
        trainable["qformer"] = attach(frozen["qformer"], adapters["qformer"], scale)
    if "language" in adapters and "language" in frozen:
        frozen["language"] = attach(frozen["language"], adapters["language"], scale)
    return trainable, frozen


def bare(tree: params.Tree) -> params.Tree:
    """A tree without its adapters."""
    flat = params.flatten(tree)
    return params.unflatten({path: flat[path] for path in flat if not path.endswith(("/lora_a", "/lora_b"))})


class Pair(NamedTuple):
    """An adapter as `attach` leaves it.

    Attributes:
      a: float32[..., inputs, rank], behind the axes that its kernel is stacked over.
      b: float32[..., rank, outputs], its scale included.
      stacked: how many of the first axes those are.
    """

    a: jax.Array
    b: jax.Array
    stacked: int

    def at(self, index: tuple[int, ...]) -> Pair:
        """That of one of the stacked kernels."""
        return Pair(self.a[index], self.b[index], self.stacked - len(index))

    def product(self) -> jax.Array:
        """What it adds to its kernel, float32 of the kernel's shape."""
        multiply = lambda a, b: jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
        for _ in range(self.stacked):
            multiply = jax.vmap(multiply)
        return multiply(self.a, self.b)


def pairs(tree: params.Tree) -> dict[str, Pair]:
    """The adapters in a tree of `attach` by the paths of their kernels, of which only the shapes count."""
    flat, found = params.flatten(tree), {}
    for path, a in flat.items():
        where, _, name = path.rpartition("/")
        if name == "lora_a":
            b, kernel = flat[f"{where}/lora_b"], flat[f"{where}/kernel"]
            found[f"{where}/kernel"] = Pair(a, b, a.ndim + b.ndim - 2 - len(kernel.shape))
    return found


def merge(tree: params.Tree) -> params.Tree:
    """A tree of `attach` without adapters, whose kernels do what these did beside them."""
    flat = params.flatten(bare(tree))
    for path, pair in pairs(tree).items():
        flat[path] = (flat[path].astype(jnp.float32) + pair.product()).astype(flat[path].dtype)
    return params.unflatten(flat)
