"""Vision transformers from LAVIS and Hugging Face files: sizes from their config.json, weights by path table."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip2_jax import params
from blip2_jax.checkpoints import mapping
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
        (r"blocks\.\d+\..*", "a block behind those that BLIP-2 uses"),
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
        (r"transformer\.resblocks\.\d+\..*", "a block behind those that BLIP-2 uses"),
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
        (r"encoder\.layers\.\d+\..*", "a block behind those that BLIP-2 uses"),
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


def vit_config(config: dict[str, Any], **changes: Any) -> tuple[ViTConfig, Dialect]:
    """Sizes and dialect from a Hugging Face vision config; `changes` replace single fields.

    CLIP is used as in the paper, up to its second-last block and without its last norm; SigLIP as a whole.

    Raises:
      ValueError: a model_type that is none of BLIP-2's, InstructBLIP's, CLIP's, SigLIP's.
    """
    kind = config.get("model_type", "")
    size, patch, width = config["image_size"], config["patch_size"], config["hidden_size"]
    fields = {
        "image_size": size,
        "patch": patch,
        "width": width,
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_width": config["intermediate_size"],
        "activation": _ACTIVATIONS[config["hidden_act"]],
        "norm_epsilon": config["layer_norm_eps"],
    }
    if kind in ("blip_2_vision_model", "instructblip_vision_model"):
        dialect = TRANSFORMERS_BLIP2
    elif kind == "clip_vision_model":
        dialect = TRANSFORMERS_CLIP
        fields |= {"layers": fields["layers"] - 1, "patch_bias": False, "pre_norm": True}
    elif kind == "siglip_vision_model":
        dialect = TRANSFORMERS_SIGLIP
        fields |= {"class_token": False, "final_norm": True}
    else:
        raise ValueError(
            f"the image encoder's model_type is {kind!r}; expected blip_2_vision_model, instructblip_vision_model, "
            "clip_vision_model or siglip_vision_model"
        )
    return ViTConfig(**(fields | changes)), dialect


def lavis_config(tensors: Tensors, **changes: Any) -> tuple[ViTConfig, Dialect]:
    """Sizes and dialect of a tower in LAVIS's names, from the shapes of its tensors; `changes` replace single fields.

    Raises:
      ValueError: neither EVA-CLIP ViT-g nor CLIP ViT-L.
    """
    known = set(tensors.names())
    eva = "patch_embed.proj.weight" in known
    dialect = LAVIS_EVA if eva else LAVIS_CLIP
    width, _, patch, _ = tensors.read(f"{dialect.patch}.weight").shape
    tokens = tensors.read(dialect.positions).shape[-2]
    if (eva, width) not in ((True, 1408), (False, 1024)) and "heads" not in changes:
        raise ValueError(
            f"{tensors.where}: a ViT of width {width} is neither EVA-CLIP ViT-g (1408) nor CLIP ViT-L (1024)"
        )
    blocks = 1 + max(
        int(name.removeprefix(f"{dialect.layers}.").partition(".")[0]) for name in known if dialect.layers in name
    )
    fields = {
        "image_size": math.isqrt(tokens - 1) * patch,
        "patch": patch,
        "width": width,
        "layers": min(blocks, 39 if eva else 23),
        "heads": 16,
        "mlp_width": len(tensors.read(f"{dialect.layers}.0.{dialect.up}.bias")),
        "activation": "gelu" if eva else "quick_gelu",
        "norm_epsilon": 1e-6 if eva else 1e-5,
        "patch_bias": eva,
        "pre_norm": not eva,
    }
    return ViTConfig(**(fields | changes)), dialect


def load(
    tensors: Tensors, config: ViTConfig, dialect: Dialect, image_size: int, dtype: Any
) -> tuple[ViTConfig, dict, Report]:
    """Read a tower and fit its position embedding to pictures of another size.

    Args:
      tensors: of the tower alone.
      config, dialect: of the file.
      image_size: the side of the pictures that will come.
      dtype: of the parameters.

    Returns:
      The config for that size, the tree of `ViT`, and what was found in the file.
    """
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    shapes = jax.eval_shape(lambda image: ViT(config).init(jax.random.key(0), image)["params"], image)
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    mapped = mapping.resolve(template, table(dialect, config), lambda path: layers_of(config, path))
    resized = dataclasses.replace(config, image_size=image_size)

    def put(path: str, array: np.ndarray) -> jax.Array:
        if path == "positions":
            array = resize_positions(array, config.image_size, resized, dialect.align_corners)
        return jnp.asarray(array)

    tree = mapping.load(template, mapped, tensors, put)
    return resized, tree, mapping.account(tensors.names(), mapping.names(mapped), dialect.aside)
