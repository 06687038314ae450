"""The frozen parts a run is built on: the image encoder, the BERT that the Q-Former starts from, the language model.

Each is named by one string:

    nano:         the small part of the nano recipe (assets, or a pinned package in the cache)
    hf:DIR        a Hugging Face directory; for the image encoder, a directory of ours
    random:SEED   the nano image encoder with random weights, for ablations

The environment variable BLIP2_JAX_FROZEN="part=DIR,part=DIR" replaces where parts are read from, not what they must be:
a checkpoint knows the content hash of its parts.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip2_jax import params
from blip2_jax.checkpoints import downloads, language, mapping
from blip2_jax.checkpoints.huggingface import Directory
from blip2_jax.models import vision

ASSETS = pathlib.Path(__file__).parent.parent / "assets"
PARTS = ("vision", "bert", "llm")


class Frozen(NamedTuple):
    """One part, found and identified, its weights not yet read.

    Attributes:
      part: "vision", "bert" or "llm".
      source: the string that named it.
      directory: where it is.
      sha256: of its weights.
    """

    part: str
    source: str
    directory: Directory
    sha256: str

    def identity(self, dtype: Any) -> dict[str, str]:
        """What a checkpoint remembers of this part."""
        return {"source": self.source, "sha256": self.sha256, "dtype": str(jnp.dtype(dtype))}


def frozen_dtype() -> jnp.dtype:
    """bfloat16 on accelerators; float32 on a CPU, whose bfloat16 products are no faster."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def _overrides() -> dict[str, str]:
    text = os.environ.get("BLIP2_JAX_FROZEN", "")
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    for part, separator, directory in pairs:
        if not separator or part.strip() not in PARTS or not directory:
            raise ValueError(f"BLIP2_JAX_FROZEN={text!r}: expected part=DIR with part one of {', '.join(PARTS)}")
    return {part.strip(): directory.strip() for part, _, directory in pairs}


def _locate(part: str, source: str) -> pathlib.Path:
    kind, separator, rest = source.partition(":")
    if kind == "nano" and separator and not rest:
        if part == "vision":
            return ASSETS / "efficientnet_lite0"
        return downloads.fetch({"bert": downloads.MINILM, "llm": downloads.SMOLLM2}[part])
    if kind == "hf" and rest:
        return pathlib.Path(rest).expanduser()
    if kind == "random" and part == "vision" and rest.isdigit():
        return ASSETS / "efficientnet_lite0"
    raise ValueError(
        f"config.{part} = {source!r}: expected nano: or hf:DIR" + (" or random:SEED" if part == "vision" else "")
    )


def find(part: str, source: str) -> Frozen:
    """Locate a part and hash its weights.

    Raises:
      FileNotFoundError, ConnectionError, ValueError: it is not there, cannot be fetched, or the string means nothing.
    """
    override = _overrides().get(part)
    directory = Directory(override or _locate(part, source))
    if source.startswith("random:"):
        return Frozen(part, source, directory, hashlib.sha256(source.encode()).hexdigest())
    digest = hashlib.sha256()
    for file in directory.files:
        digest.update(downloads.file_sha256(file).encode())
    return Frozen(part, source, directory, digest.hexdigest())


def check(parts: dict[str, Frozen], remembered: dict[str, dict[str, str]], where: str) -> None:
    """Refuse to continue a checkpoint with other frozen weights than its own."""
    for name, known in remembered.items():
        found = parts.get(name)
        if found is not None and found.sha256 != known["sha256"]:
            raise ValueError(
                f"{where} was trained with the {name} {known['source']!r} of SHA-256 {known['sha256'][:16]}..., but "
                f"{found.directory.path} has {found.sha256[:16]}...: point to the right weights with "
                f"BLIP2_JAX_FROZEN={name}=DIR"
            )


def load_vision(part: Frozen, dtype: Any) -> tuple[vision.VisionEncoder, dict]:
    """The image encoder and its parameters."""
    encoder = vision.build(part.directory.config(), dtype)
    if part.source.startswith("random:"):
        seed = int(part.source.partition(":")[2])
        _, variables = jax.jit(encoder.init, static_argnums=1)(jax.random.key(seed), 64)
        return encoder, jax.tree.map(lambda x: x.astype(dtype), variables["params"])
    tree = params.unflatten({name: part.directory.read(name).astype(dtype) for name in part.directory.names()})
    shapes = jax.eval_shape(lambda key: encoder.init(key, 64), jax.random.key(0))[1]["params"]
    expected = {path: leaf.shape for path, leaf in params.flatten(shapes).items()}
    found = {path: leaf.shape for path, leaf in params.flatten(tree).items()}
    if expected != found:
        wrong = sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))
        raise ValueError(
            f"{part.directory.path} does not hold the encoder that its config.json describes; "
            f"{wrong[0]}: expected {expected.get(wrong[0])}, found {found.get(wrong[0])}"
        )
    return encoder, jax.tree.map(jnp.asarray, tree)


def load_language_model(part: Frozen, dtype: Any, **changes: Any) -> tuple[nn.Module, dict]:
    """The language model and its parameters; `changes` replace single fields of its configuration."""
    family = language.family(part.directory.config())
    config = family.config(part.directory.config(), dtype=dtype, **changes)
    model = family.module(config)
    init = lambda ids: model.init(jax.random.key(0), ids, method="initialize")["params"]
    shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((1, 2), jnp.int32))
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    mapped = mapping.resolve(template, family.table(config), lambda path: family.layers(config, path))
    return model, mapping.load(template, mapped, part.directory, lambda _, array: jnp.asarray(array))
