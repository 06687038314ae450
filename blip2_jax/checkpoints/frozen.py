"""The frozen parts a run is built on: the image encoder, the BERT that the Q-Former starts from, the language model.

Each is named by one string:

    nano:         the small part of the nano recipe (assets, or a pinned package in the cache)
    hf:DIR        a Hugging Face directory: a bare model, or the BLIP-2 or InstructBLIP around it; hf:ORG/NAME is looked
                  for in the hub's cache, and fetched where there is a network
    lavis:FILE    an image encoder as LAVIS has it (eva_vit_g.pth, clip_vit_L.pth, a fine-tuned BLIP-2)
    random:SEED   the nano image encoder with random weights, for ablations

The environment variable BLIP2_JAX_FROZEN="part=DIR,part=DIR" replaces where parts are read from, not what they must be:
a checkpoint knows the content hash of its parts.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip2_jax import params
from blip2_jax.checkpoints import downloads, hub, language, mapping, published
from blip2_jax.checkpoints import vision as towers
from blip2_jax.checkpoints.huggingface import Directory, complete, read_config
from blip2_jax.checkpoints.torch_file import TorchFile
from blip2_jax.models import vision
from blip2_jax.models.vision.vit import ViT

ASSETS = pathlib.Path(__file__).parent.parent / "assets"
PARTS = ("vision", "bert", "llm", "qformer")  # The last is of `base`.


@dataclasses.dataclass(frozen=True)
class Frozen:
    """One part by its name; it is looked for, opened and hashed when that is needed.

    Attributes:
      part: "vision", "bert" or "llm".
      source: the string that names it.
    """

    part: str
    source: str

    @property
    def kind(self) -> str:
        return self.source.partition(":")[0]

    @functools.cached_property
    def path(self) -> pathlib.Path:
        """Where it is.

        Raises:
          FileNotFoundError, ConnectionError, ValueError: it is not there, or cannot be fetched.
        """
        instead = override(self.part)
        return pathlib.Path(instead).expanduser() if instead else _locate(self.part, self.source)

    @functools.cached_property
    def tensors(self) -> Directory | TorchFile:
        """Its weights, to be read one by one."""
        return TorchFile(self.path) if self.kind == "lavis" else Directory(self.path)

    @functools.cached_property
    def sha256(self) -> str:
        """Of its weights."""
        if self.kind == "random":
            return hashlib.sha256(self.source.encode()).hexdigest()
        digest = hashlib.sha256()
        for file in self.tensors.files:
            digest.update(downloads.file_sha256(file).encode())
        return digest.hexdigest()

    def identity(self, dtype: Any) -> dict[str, str]:
        """What a checkpoint remembers of this part."""
        return {"source": self.source, "sha256": self.sha256, "dtype": str(jnp.dtype(dtype))}

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json, complete; of a published model that is not here, what is known of it."""
        named = override(self.part) or self.source.partition(":")[2]
        if self.kind != "hf":
            return read_config(self.path / "config.json")
        file = hub.config_file(named, cached=True)
        if file is None and named in published.CONFIGS:
            return published.config(named)
        file = file or hub.config_file(named, cached=False)
        return complete(read_config(file), str(file))

    @property
    def model_type(self) -> str:
        """Of the language model."""
        return language.own_config(self.config).get("model_type", "")


def frozen_dtype() -> jnp.dtype:
    """bfloat16 on accelerators; float32 on a CPU, whose bfloat16 products are no faster."""
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)


def override(part: str) -> str | None:
    """The directory that BLIP2_JAX_FROZEN says a part is read from; None if it says nothing of it.

    Raises:
      ValueError: it says what makes no sense.
    """
    text = os.environ.get("BLIP2_JAX_FROZEN", "")
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    for name, separator, directory in pairs:
        if not separator or name.strip() not in PARTS or not directory:
            raise ValueError(f"BLIP2_JAX_FROZEN={text!r}: expected part=DIR with part one of {', '.join(PARTS)}")
    return {name.strip(): directory.strip() for name, _, directory in pairs}.get(part)


def _locate(part: str, source: str) -> pathlib.Path:
    kind, _, rest = source.partition(":")
    if kind in ("nano", "random") and part == "vision":
        return ASSETS / "efficientnet_lite0"
    if kind == "nano":
        return downloads.fetch({"bert": downloads.MINILM, "llm": downloads.SMOLLM2}[part])
    return hub.directory(rest) if kind == "hf" else pathlib.Path(rest).expanduser()


def find(part: str, source: str) -> Frozen:
    """A part by the string that names it.

    Raises:
      ValueError: the string means nothing.
    """
    kind, separator, rest = source.partition(":")
    valid = {"nano": bool(separator) and not rest, "hf": bool(rest)}
    if part == "vision":
        valid |= {"lavis": bool(rest), "random": rest.isdigit()}
    if not valid.get(kind):
        expected = "nano: or hf:DIR" + (" or lavis:FILE or random:SEED" if part == "vision" else "")
        raise ValueError(f"config.{part} = {source!r}: expected {expected}")
    return Frozen(part, source)


def check(parts: Mapping[str, Frozen], remembered: Mapping[str, Mapping[str, str]], where: str) -> None:
    """Refuse to continue a checkpoint with other frozen weights than its own."""
    for name, known in remembered.items():
        found = parts.get(name)
        if found is not None and found.sha256 != known["sha256"]:
            raise ValueError(
                f"{where} was trained with the {name} {known['source']!r} of SHA-256 {known['sha256'][:16]}..., but "
                f"{found.path} has {found.sha256[:16]}...: point to the right weights with "
                f"BLIP2_JAX_FROZEN={name}=DIR"
            )


# The image encoder.


def _tower(part: Frozen) -> towers.Tower | None:
    """What the file of a ViT holds; None where the encoder is one of ours."""
    if part.kind == "lavis":
        known = published.TOWERS.get(pathlib.Path(part.source.partition(":")[2]).name)
        return known if known and not part.path.exists() else towers.lavis_tower(part.tensors)
    config = part.config
    return None if vision.is_ours(config) else towers.huggingface_tower(config)


def vision_encoder(part: Frozen, image_size: int, dtype: Any) -> vision.VisionEncoder:
    """The image encoder for pictures of a size, without its weights.

    Raises:
      ValueError: its config.json describes none that we know, or the size does not suit it.
    """
    tower = _tower(part)
    if tower is None:
        return vision.build(part.config, image_size, dtype)
    if image_size != tower.config.image_size and image_size % tower.config.patch:
        raise ValueError(f"image_size {image_size} is not a multiple of the ViT's patches of {tower.config.patch}")
    config = dataclasses.replace(tower.config, image_size=image_size, dtype=dtype)
    return vision.VisionEncoder(ViT(config), config.width, image_size, tower.image_mean, tower.image_std)


def load_vision(part: Frozen, encoder: vision.VisionEncoder, dtype: Any, put: mapping.Put = mapping.to_device) -> dict:
    """The parameters of an image encoder that `vision_encoder` made."""
    if part.kind == "random":
        seed = int(part.source.partition(":")[2])
        tree = jax.tree.map(lambda x: x.astype(dtype), jax.jit(encoder.init)(jax.random.key(seed)))
        return params.map_paths(put, tree)
    tower = _tower(part)
    if tower is not None:
        tree, report = towers.load(tower, part.tensors, encoder.module.config, dtype, put)
        report.tell(part.tensors.where)
        return tree
    template = mapping.template(encoder.init, dtype)
    mapped = mapping.resolve(template, [(r"(.*)", mapping.Foreign("{0}", mapping.as_is()))], lambda path: None)
    return mapping.load(template, mapped, part.tensors, put)


# The language model.


def language_model(part: Frozen, dtype: Any, **changes: Any) -> nn.Module:
    """The language model without its weights; `changes` replace single fields of its configuration."""
    config = language.own_config(part.config)
    family = language.family(config)
    return family.module(family.config(config, dtype=dtype, **changes))


def load_language_model(part: Frozen, model: nn.Module, dtype: Any, put: mapping.Put = mapping.to_device) -> dict:
    """The parameters of a language model that `language_model` made."""
    family = language.family(language.own_config(part.config))
    tensors = language.tensors(family, part.tensors)
    template = language.shapes(model, dtype)
    mapped = mapping.resolve(template, family.table(model.config), functools.partial(family.layers, model.config))
    tree = mapping.load(template, mapped, tensors, put)
    mapping.account(tensors.names(), mapping.names(mapped), family.aside).tell(tensors.where)
    return tree
