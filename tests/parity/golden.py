"""Golden cases: recorded weights, inputs and outputs of the originals, and our models built to fit them.

Nothing about sizes is known here; architecture.json (LAVIS), config.json (transformers) and the arrays say it all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from blip2_jax import params
from blip2_jax.checkpoints import language, mapping, qformer, vision
from blip2_jax.checkpoints.huggingface import Directory
from blip2_jax.models.blip2 import Blip2Config, ImageTextModel, SoftPromptModel
from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.models.vision.vit import ViT, ViTConfig
from blip2_jax.parallel import mesh as meshes
from blip2_jax.parallel import sharding

_ACTIVATIONS = {"gelu_erf": "gelu", "quick_gelu": "quick_gelu"}


class Case:
    """One folder of recorded data."""

    def __init__(self, path: pathlib.Path):
        self.path, self.program, self.name = path, path.parent.name, path.name

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.path / name) as archive:
            return dict(archive)

    @functools.cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        return self._arrays("inputs.npz")

    @functools.cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        return self._arrays("outputs.npz")

    @functools.cached_property
    def gradients(self) -> dict[str, np.ndarray]:
        return load_file(self.path / "grads.safetensors")

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.path / "meta.json").read_text())

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """config.json of a transformers case."""
        return json.loads((self.path / "config.json").read_text())

    @functools.cached_property
    def architecture(self) -> dict[str, Any]:
        """Sizes of all LAVIS cases."""
        return json.loads((self.path.parent / "architecture.json").read_text())

    @functools.cached_property
    def weights(self) -> Directory:
        """Those of the case that meta.json names, or its own."""
        named = self.meta.get("initial_weights") or str(self.meta.get("weights", "")).removeprefix("same as ")
        named = named.partition("/")[0]
        return Directory(self.path.parent / named if (self.path.parent / named / "meta.json").exists() else self.path)

    @functools.cached_property
    def final(self) -> dict[str, np.ndarray]:
        """The weights after training."""
        tensors = load_file(self.path / "model.safetensors")
        return {name.removeprefix("final/"): array for name, array in tensors.items()}

    def image(self, name: str) -> np.ndarray:
        """Pictures, normalised, as we hold them: float32[B, S, S, 3]."""
        return self.inputs[name].transpose(0, 2, 3, 1)


class Built(NamedTuple):
    """A module of ours with parameters from the case.

    Attributes:
      module: the Flax module.
      parameters: numpy tree.
      mapped: where they come from.
    """

    module: nn.Module
    parameters: dict
    mapped: mapping.Mapped


def _built(case: Case, module: nn.Module, init: Callable, table, layers_of, prefix: str = "", **added) -> Built:
    """A module with its parameters; `added` are those that the files do not have."""
    template = jax.eval_shape(lambda: init(jax.random.key(0)))["params"]
    template = {name: tree for name, tree in template.items() if name not in added}
    mapped = mapping.resolve(template, params.relevant(table, template), layers_of, prefix)
    return Built(module, mapping.load(template, mapped, case.weights) | added, mapped)


# The parts of a model, in LAVIS's sizes and names and in transformers'.


def vit(case: Case, kind: str = "eva", prefix: str = "") -> tuple[ViTConfig, vision.Dialect, Built]:
    """The image encoder; `kind` and `prefix` count for LAVIS."""
    if case.program == "hf":
        config, dialect = vision.huggingface_tower(case.config)[:2]
        config = dataclasses.replace(config, dtype=jnp.float32)
        prefix = "vision_model."
    else:
        a = case.architecture[f"vision_{kind}"]
        dialect = {"eva": vision.LAVIS_EVA, "clip": vision.LAVIS_CLIP}[kind]
        config = ViTConfig(
            image_size=a["image_size"],
            patch=a["patch_size"],
            width=a["width"],
            layers=a["depth"],
            heads=a["heads"],
            mlp_width=a["mlp_hidden"],
            activation=_ACTIVATIONS[a["activation"]],
            norm_epsilon=a["norm_eps"],
            patch_bias=kind == "eva",
            pre_norm=kind == "clip",
            dtype=jnp.float32,
        )
    image = jnp.zeros((1, config.image_size, config.image_size, 3))
    init = lambda key: ViT(config).init(key, image)
    layers_of = functools.partial(vision.layers_of, config)
    return config, dialect, _built(case, ViT(config), init, vision.table(dialect, config), layers_of, prefix)


def _blip2_config(case: Case) -> Blip2Config:
    if case.program == "hf":
        q = case.config["qformer_config"]
        return Blip2Config(
            QFormerConfig(
                width=q["hidden_size"],
                layers=q["num_hidden_layers"],
                heads=q["num_attention_heads"],
                mlp_width=q["intermediate_size"],
                vocab_size=q["vocab_size"],
                max_positions=q["max_position_embeddings"],
                cross_attention_every=q["cross_attention_frequency"],
                queries=case.config["num_query_tokens"],
                norm_epsilon=q["layer_norm_eps"],
                dropout=0.0,  # The recordings are of eval mode.
                attention_dropout=0.0,
                dtype=jnp.float32,
            ),
            embed_width=case.config.get("image_text_hidden_size", 0),
            ln_vision_epsilon=case.config["vision_config"]["layer_norm_eps"],
        )
    a = case.architecture
    q = a["qformer"]
    return Blip2Config(
        QFormerConfig(
            width=q["hidden"],
            layers=q["layers"],
            heads=q["heads"],
            mlp_width=q["ffn"],
            vocab_size=q["vocab"],
            max_positions=q["positions"],
            cross_attention_every=q["cross_attention_every"],
            queries=q["queries"],
            norm_epsilon=q["norm_eps"],
            dropout=0.0,
            attention_dropout=0.0,
            dtype=jnp.float32,
        ),
        embed_width=a["stage1"]["embed_dim"],
        ln_vision_epsilon=a["ln_vision_eps"],
    )


def _stage1_init(case: Case, config: Blip2Config) -> tuple[ImageTextModel, Callable]:
    """The module of stage 1, and its initialisation by the passes that the program has."""
    module = ImageTextModel(config)
    ids, mask = jnp.zeros((2, 4), jnp.int32), jnp.ones((2, 4), bool)

    def every_pass(model: ImageTextModel, image: jax.Array):
        projected = model.project_image(image)
        seen = model.image_features(projected)
        model.text_features(ids, mask)
        model.match(projected, ids, mask)
        if case.program == "lavis":  # transformers has no ITG.
            model.caption_features(seen.cache, ids, mask)

    if case.program == "hf":
        width = case.config["vision_config"]["hidden_size"]
    else:
        width = case.architecture["vision_eva"]["width"]
    return module, lambda key: module.init(key, jnp.zeros((2, 3, width)), method=every_pass)


def fresh_stage1(case: Case) -> tuple[Blip2Config, dict]:
    """A newly initialised stage 1 in LAVIS's sizes."""
    config = _blip2_config(case)
    return config, jax.jit(_stage1_init(case, config)[1])(jax.random.key(0))["params"]


def lavis_tensors(tree: dict, config: Blip2Config) -> dict[str, np.ndarray]:
    """A part of the trainable tree by its LAVIS names."""
    table = params.relevant(qformer.table(qformer.lavis()), tree)
    mapped = mapping.resolve(tree, table, functools.partial(qformer.layers_of, config.qformer))
    return dict(mapping.export(tree, mapped))


def stage1(case: Case) -> tuple[Blip2Config, Built]:
    """The Q-Former with the heads of stage 1."""
    config = _blip2_config(case)
    module, init = _stage1_init(case, config)
    layers_of = functools.partial(qformer.layers_of, config.qformer)
    dialect = qformer.lavis() if case.program == "lavis" else qformer.TRANSFORMERS["blip-2"]
    added = {} if case.program == "lavis" else {"temperature": np.float32(1)}  # transformers has none.
    return config, _built(case, module, init, qformer.table(dialect), layers_of, **added)


def soft_prompt(case: Case, instruct: bool, projection: str = "") -> tuple[Blip2Config, Built]:
    """The Q-Former of stage 2; `projection` is LAVIS's name of the language projection."""
    config = _blip2_config(case)
    name = f"{projection}.weight" if projection else "language_projection.weight"
    module = SoftPromptModel(config, case.weights.read(name).shape[0])
    text = (jnp.zeros((2, 4), jnp.int32), jnp.ones((2, 4), bool)) if instruct else ()
    width = vit(case, prefix="visual_encoder.")[0].width
    init = lambda key: module.init(key, jnp.zeros((2, 3, width)), *text)
    layers_of = functools.partial(qformer.layers_of, config.qformer)
    dialect = qformer.lavis(projection) if projection else qformer.TRANSFORMERS[case.config["model_type"]]
    return config, _built(case, module, init, qformer.table(dialect), layers_of)


def language_model(case: Case, kind: str = "") -> tuple[Any, Built]:
    """The language model; `kind` (opt, t5, llama) counts for LAVIS."""
    config = case.config["text_config"] if case.program == "hf" else _lavis_language(case.architecture, kind)
    family = language.family(config)
    sizes = family.config(config, dtype=jnp.float32)
    module = family.module(sizes)
    init = lambda key: module.init(key, jnp.zeros((1, 2), jnp.int32), method="initialize")
    prefix = "language_model." if case.program == "hf" else {"llama": "llm"}.get(kind, kind) + "_model."
    layers_of = functools.partial(family.layers, sizes)
    return sizes, _built(case, module, init, family.table(sizes), layers_of, prefix)


def _lavis_language(architecture: dict[str, Any], kind: str) -> dict[str, Any]:
    """architecture.json in the words of a Hugging Face config.json."""
    a = architecture[kind]
    if kind == "t5":
        return {
            "model_type": "t5",
            "vocab_size": a["vocab"],
            "d_model": a["hidden"],
            "d_kv": a["head_dim"],
            "d_ff": a["ffn"],
            "num_layers": a["encoder_layers"],
            "num_decoder_layers": a["decoder_layers"],
            "num_heads": a["heads"],
            "relative_attention_num_buckets": a["relative_attention_buckets"],
            "relative_attention_max_distance": a["relative_attention_max_distance"],
            "feed_forward_proj": "gated-gelu",
            "dense_act_fn": {"gated gelu_erf": "gelu", "gated gelu_tanh": "gelu_new"}[a["activation"]],
            "layer_norm_epsilon": a["norm_eps"],
        }
    shared = {
        "vocab_size": a["vocab"],
        "hidden_size": a["hidden"],
        "num_hidden_layers": a["layers"],
        "num_attention_heads": a["heads"],
        "max_position_embeddings": a["positions"],
    }
    if kind == "opt":
        own = {"model_type": "opt", "ffn_dim": a["ffn"], "activation_function": a["activation"]}
        return shared | own | {"tie_word_embeddings": a["tied_embeddings"]}
    own = {"model_type": "llama", "intermediate_size": a["ffn"], "rms_norm_eps": a["norm_eps"]}
    return shared | own | {"rope_theta": a["rope_theta"], "hidden_act": a["activation"]}


# One device or many.


@contextlib.contextmanager
def float64():
    """Models that are built and run in here do everything in float64, also where our modules ask for float32."""
    with jax.enable_x64(True), mock.patch.object(jnp, "float32", jnp.float64):
        yield


def row_axes(mesh: Mesh, rows: int) -> tuple[str, ...]:
    """The longest run of a mesh's axes that divides so many rows; along the others a batch is whole."""
    axes: tuple[str, ...] = ()
    for axis in meshes.ROW_AXES:
        if rows % math.prod(mesh.shape[name] for name in (*axes, axis)):
            break
        axes += (axis,)
    return axes


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch with its rows over the axes of `row_axes`."""
    rows = len(next(iter(batch.values())))
    axes = row_axes(mesh, rows)
    print(f"{rows} rows over {axes or 'no axis'}, whole along the others")
    place = NamedSharding(mesh, PartitionSpec(axes or None))
    return {name: sharding.put(array, place) for name, array in batch.items()}


def run(function: Callable, trees: Any, batch: dict[str, np.ndarray], mesh: Mesh | None) -> Any:
    """function(trees, batch) under jit, as numpy arrays; on a mesh parameters and batch are spread over it."""
    as_asked = lambda x: x.astype(jnp.float32) if np.issubdtype(x.dtype, np.floating) else x
    trees, batch = jax.tree.map(as_asked, (trees, batch))
    if mesh is None:
        return jax.tree.map(np.asarray, jax.jit(function)(trees, batch))
    places = {name: sharding.shardings(tree, mesh) for name, tree in trees.items()}
    trees = jax.tree.map(sharding.put, trees, places)
    with jax.set_mesh(mesh):
        # Whole everywhere, so that each of several processes can read it.
        everywhere = jax.jit(function, out_shardings=meshes.replicated(mesh))
        return jax.tree.map(np.asarray, everywhere(trees, place_batch(batch, mesh)))


def by_layer(transformer: dict[str, Any], pick: Callable) -> list:
    """pick(what was captured of a layer), for every layer of a Q-Former in order."""
    groups = transformer.get("groups", {})
    names = sorted((name for name in groups if name.startswith("layer_")), key=lambda name: int(name[6:]))
    count = len(jax.tree.leaves(groups)[0]) if names else 0
    layers = [jax.tree.map(lambda x, g=g: x[g], groups[name]) for g in range(count) for name in names]
    tail = transformer.get("tail", {})
    layers += [tail[name] for name in sorted(tail) if name.startswith("layer_")]
    return [pick(layer) for layer in layers]
