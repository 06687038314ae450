"""Vision transformers from LAVIS and Hugging Face files: sizes from their config.json, weights by path table."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from blip2_jax import params
from blip2_jax.checkpoints import mapping
from blip2_jax.checkpoints.huggingface import part_of
from blip2_jax.checkpoints.mapping import Foreign, Report, Tensors, as_is, convolution, flat, leading, linear
from blip2_jax.models.vision.vit import ViT, ViTConfig, resize_positions

# What CLIP was trained with, and EVA-CLIP and BLIP-2 after it.
CLIP_MEAN = tuple(255 * mean for mean in (0.48145466, 0.4578275, 0.40821073))
CLIP_STD = tuple(255 * std for std in (0.26862954, 0.26130258, 0.27577711))


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What a program calls the parts of a ViT.

    Attributes:
      patch, class_token, positions: the embeddings; a suffix .weight is written out.
      class_axes, position_axes: axes of length 1 at the front of those two.
      layers: before the number of a block.
      norms: before the attention, before the MLP.
      qkv_kernel, qkv_bias: one tensor or three; None is a bias that is always zero.
      output, up, down: attention output and the two layers of the MLP.
      pre_norm, final_norm: around the blocks; "" where there is none.
      align_corners: how it interpolates positions.
      aside: tensors that are left out, with the reason.
    """

    patch: str
    class_token: str
    positions: str
    class_axes: int
    position_axes: int
    layers: str
    norms: tuple[str, str]
    qkv_kernel: str | tuple[str, ...]
    qkv_bias: str | tuple[str | None, ...]
    output: str
    up: str
    down: str
    pre_norm: str = ""
    final_norm: str = ""
    align_corners: bool = False
    aside: params.Table[str] = ()


LAVIS_EVA = Dialect(
    patch="patch_embed.proj",
    class_token="cls_token",
    positions="pos_embed",
    class_axes=2,
    position_axes=1,
    layers="blocks",
    norms=("norm1", "norm2"),
    qkv_kernel="attn.qkv.weight",
    qkv_bias=("attn.q_bias", None, "attn.v_bias"),
    output="attn.proj",
    up="mlp.fc1",
    down="mlp.fc2",
    aside=[
        (r"(fc_)?norm\..*|head\..*", "EVA-CLIP's own head"),
    ],
)
LAVIS_CLIP = Dialect(
    patch="conv1",
    class_token="class_embedding",
    positions="positional_embedding",
    class_axes=0,
    position_axes=0,
    layers="transformer.resblocks",
    norms=("ln_1", "ln_2"),
    qkv_kernel="attn.in_proj_weight",
    qkv_bias="attn.in_proj_bias",
    output="attn.out_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    pre_norm="ln_pre",
    align_corners=True,
    aside=[
        (r"ln_post\..*|proj", "CLIP's own head"),
    ],
)
TRANSFORMERS_BLIP2 = Dialect(
    patch="embeddings.patch_embedding",
    class_token="embeddings.class_embedding",
    positions="embeddings.position_embedding",
    class_axes=2,
    position_axes=1,
    layers="encoder.layers",
    norms=("layer_norm1", "layer_norm2"),
    qkv_kernel="self_attn.qkv.weight",
    qkv_bias="self_attn.qkv.bias",
    output="self_attn.projection",
    up="mlp.fc1",
    down="mlp.fc2",
    aside=[(r"post_layernorm\..*", "trained: it is ln_vision")],
)
TRANSFORMERS_CLIP = dataclasses.replace(
    TRANSFORMERS_BLIP2,
    class_axes=0,
    positions="embeddings.position_embedding.weight",
    position_axes=0,
    qkv_kernel=tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    qkv_bias=tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
    output="self_attn.out_proj",
    pre_norm="pre_layrnorm",  # Spelled so there.
    aside=[
        (r"post_layernorm\..*", "CLIP's own head"),
        (r"embeddings\.position_ids", "a buffer"),
    ],
)
TRANSFORMERS_SIGLIP = dataclasses.replace(
    TRANSFORMERS_CLIP,
    pre_norm="",
    final_norm="post_layernorm",
    aside=[(r"head\..*", "SigLIP's own pooling"), (r"embeddings\.position_ids", "a buffer")],
)


def table(d: Dialect, config: ViTConfig) -> params.Table[Foreign]:
    """Rows for the tree of a `ViT`."""
    layer = f"{d.layers}.{{layer}}."
    inside = lambda name: tuple(part and layer + part for part in name) if isinstance(name, tuple) else layer + name
    norm = lambda path, name: [
        (rf"{path}/scale", Foreign(f"{name}.weight", as_is())),
        (rf"{path}/bias", Foreign(f"{name}.bias", as_is())),
    ]
    rows = [
        (r"patch_embedding/kernel", Foreign(f"{d.patch}.weight", convolution())),
        (r"positions", Foreign(d.positions, leading(d.position_axes))),
        (r"blocks/qkv/kernel", Foreign(inside(d.qkv_kernel), linear(), pieces=1)),
        (r"blocks/qkv/bias", Foreign(inside(d.qkv_bias), flat())),
        (r"blocks/output/kernel", Foreign(f"{layer}{d.output}.weight", linear(inputs=2))),
        (r"blocks/output/bias", Foreign(f"{layer}{d.output}.bias", as_is())),
        *norm(r"blocks/attention_norm", layer + d.norms[0]),
        *norm(r"blocks/mlp_norm", layer + d.norms[1]),
    ]
    for path, name in (("up", d.up), ("down", d.down)):
        rows.append((rf"blocks/{path}/kernel", Foreign(f"{layer}{name}.weight", linear())))
        rows.append((rf"blocks/{path}/bias", Foreign(f"{layer}{name}.bias", as_is())))
    if config.patch_bias:
        rows.append((r"patch_embedding/bias", Foreign(f"{d.patch}.bias", as_is())))
    if config.class_token:
        rows.append((r"class_token", Foreign(d.class_token, leading(d.class_axes))))
    rows += norm("pre_norm", d.pre_norm) if config.pre_norm else []
    return rows + (norm("final_norm", d.final_norm) if config.final_norm else [])


def layers_of(config: ViTConfig, path: str) -> range | None:
    """The foreign blocks that a parameter stacks, or None."""
    return range(config.layers) if path.startswith("blocks/") else None


_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


class Tower(NamedTuple):
    """A ViT as a file has it.

    Attributes:
      config: its sizes there, for pictures of the size it was trained with.
      dialect: what its tensors are called.
      prefixes: what stands before those names, the first that fits.
      image_mean, image_std: of pixel values 0 to 255.
    """

    config: ViTConfig
    dialect: Dialect
    prefixes: tuple[str, ...] = ("",)
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD


EVA_G = Tower(ViTConfig(), LAVIS_EVA, ("", "visual_encoder."))
CLIP_L = Tower(
    ViTConfig(
        width=1024,
        layers=23,
        mlp_width=4096,
        activation="quick_gelu",
        norm_epsilon=1e-5,
        patch_bias=False,
        pre_norm=True,
    ),
    LAVIS_CLIP,
    ("visual.", "", "visual_encoder."),
)


def huggingface_tower(config: dict[str, Any]) -> Tower:
    """The image encoder that a config.json describes, be it a whole model's or its own.

    CLIP is used as in the paper, up to its second-last block and without its last norm; SigLIP as a whole.

    Raises:
      ValueError: a model_type that is none of BLIP-2's, InstructBLIP's, CLIP's, SigLIP's, or an unknown activation.
    """
    config = config.get("vision_config", config)
    kind, activation = config.get("model_type", ""), config.get("hidden_act")
    if kind not in _KINDS:
        raise ValueError(f"the image encoder's model_type is {kind!r}; expected one of {', '.join(_KINDS)}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"{kind} with hidden_act = {activation!r} is not supported, only {', '.join(_ACTIVATIONS)}")
    sizes = ViTConfig(
        image_size=config["image_size"],
        patch=config["patch_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        activation=_ACTIVATIONS[activation],
        norm_epsilon=config["layer_norm_eps"],
    )
    dialect, fields = _KINDS[kind]
    if dialect is TRANSFORMERS_CLIP:
        fields = fields | {"layers": sizes.layers - 1}
    mean = std = (127.5,) * 3
    if dialect is not TRANSFORMERS_SIGLIP:
        mean, std = CLIP_MEAN, CLIP_STD
    return Tower(dataclasses.replace(sizes, **fields), dialect, ("vision_model.", ""), mean, std)


# model_type -> dialect, and what differs from BLIP-2's own ViT.
_KINDS: dict[str, tuple[Dialect, dict[str, Any]]] = {
    "blip_2_vision_model": (TRANSFORMERS_BLIP2, {}),
    "instructblip_vision_model": (TRANSFORMERS_BLIP2, {}),
    "clip_vision_model": (TRANSFORMERS_CLIP, {"patch_bias": False, "pre_norm": True}),
    "siglip_vision_model": (TRANSFORMERS_SIGLIP, {"class_token": False, "final_norm": True}),
}


def lavis_tower(tensors: Tensors) -> Tower:
    """EVA-CLIP ViT-g or CLIP ViT-L in LAVIS's names, by the shapes of its tensors.

    Raises:
      ValueError: it is neither.
    """
    for tower in (EVA_G, CLIP_L):
        sizes, names = tower.config, tower.dialect
        try:
            found = part_of(tensors, f"{names.patch}.weight", tower.prefixes)
        except ValueError:
            continue
        width, _, patch, _ = found.read(f"{names.patch}.weight").shape
        if (width, patch) != (sizes.width, sizes.patch):
            raise ValueError(
                f"{tensors.where}: a ViT of width {width} with patches of {patch}; expected width {sizes.width} "
                f"with patches of {sizes.patch}, which is what LAVIS calls by these names"
            )
        tokens = found.read(names.positions).shape[-2]
        return tower._replace(config=dataclasses.replace(sizes, image_size=math.isqrt(tokens - 1) * patch))
    raise ValueError(f"{tensors.where}: neither an EVA-CLIP ViT-g nor a CLIP ViT-L in LAVIS's names")


def load(
    tower: Tower, tensors: Tensors, config: ViTConfig, dtype: Any, put: mapping.Put = mapping.to_device
) -> tuple[dict, Report]:
    """Read a tower and fit its position embedding to pictures of another size.

    Args:
      tower: what the file holds.
      tensors: the file, which may hold more than the tower.
      config: as it will be used; like `tower.config` but for the image size and how it is run.
      dtype: of the parameters.
      put: what becomes of a finished leaf, such as its way to the devices.

    Returns:
      The tree of `ViT`, and what was found in the file.
    """
    own = part_of(tensors, f"{tower.dialect.patch}.weight", tower.prefixes)
    template = shapes(tower.config, dtype)
    mapped = mapping.resolve(template, table(tower.dialect, tower.config), functools.partial(layers_of, tower.config))

    def resize(path: str, array: np.ndarray):
        if path == "positions":
            array = resize_positions(array, tower.config.image_size, config, tower.dialect.align_corners)
        return put(path, array)

    tree = mapping.load(template, mapped, own, resize)
    behind = rf"{re.escape(tower.dialect.layers)}\.{tower.config.layers}\..*"
    aside = [*tower.dialect.aside, (behind, "of the last block, which BLIP-2 does not use")]
    return tree, mapping.account(own.names(), mapping.names(mapped), aside)


def shapes(config: ViTConfig, dtype: Any) -> params.Tree:
    """The tree of a `ViT` without its values."""
    image = jnp.zeros((1, config.image_size, config.image_size, 3))
    return mapping.template(lambda key: ViT(config).init(key, image)["params"], dtype)
