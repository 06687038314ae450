"""What is trained, in the words of other programs: LAVIS, transformers' BLIP-2 and InstructBLIP, and plain BERT.

They all store the same tensors and differ in what they call them, so there is one table, written out for a dialect.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from blip2_jax import params
from blip2_jax.checkpoints.mapping import Foreign, as_is, flat, linear
from blip2_jax.models.qformer import QFormerConfig

_LAYER = r"qformer/transformer/(?:groups|tail)/layer_\d+/"


@dataclasses.dataclass(frozen=True)
class Dialect:
    """Names where programs differ.

    Attributes:
      layers: before the number of a layer.
      attention: inside an attention module, before query, key and value.
      query_suffix: of the queries' own feed-forward networks.
      embeddings: before word_embeddings and position_embeddings.
      embeddings_norm: of queries and text.
      language_head: of ITG.
      ln_vision: the norm of the image tokens.
      vision_proj, text_proj: to the space where images and captions are compared.
      temperature: the divisor of the cosines.
      language_projection: to the language model; as what follows ln_vision, "" where a program has no such thing.
    """

    layers: str
    attention: str
    query_suffix: str
    embeddings: str
    embeddings_norm: str
    language_head: str
    ln_vision: str = ""
    vision_proj: str = ""
    text_proj: str = ""
    temperature: str = ""
    language_projection: str = ""


BERT = Dialect("encoder.layer", "self", "", "embeddings", "embeddings.LayerNorm", "cls.predictions")


# Beside the weights of an exported stage 1: what transformers' BLIP-2 has no place for.
HEADS_FILE = "stage1_heads.safetensors"
# In an InstructBLIP's directory: the folder of the tokenizer of what its Q-Former reads.
INSTRUCTION_TOKENIZER = "qformer_tokenizer"

# LAVIS's names of the language projection, and the model_type of what is behind it.
LAVIS_PROJECTIONS = {"opt_proj": "opt", "t5_proj": "t5", "llm_proj": "llama"}


def lavis(language_projection: str = "") -> Dialect:
    """LAVIS; the projection is one of `LAVIS_PROJECTIONS`, "" where there is none."""
    return Dialect(
        layers="Qformer.bert.encoder.layer",
        attention="self",
        query_suffix="_query",
        embeddings="Qformer.bert.embeddings",
        embeddings_norm="Qformer.bert.embeddings.LayerNorm",
        language_head="Qformer.cls.predictions",
        ln_vision="ln_vision",
        vision_proj="vision_proj",
        text_proj="text_proj",
        temperature="temp",
        language_projection=language_projection,
    )


_BLIP2 = Dialect(
    layers="qformer.encoder.layer",
    attention="attention",
    query_suffix="_query",
    embeddings="embeddings",
    embeddings_norm="qformer.layernorm",
    # transformers has neither ITG's head nor the temperature; our exports keep them beside its tensors.
    language_head="Qformer.cls.predictions",
    ln_vision="vision_model.post_layernorm",
    vision_proj="vision_projection",
    text_proj="text_projection",
    temperature="temp",
    language_projection="language_projection",
)
# By model_type.
TRANSFORMERS = {
    "blip-2": _BLIP2,
    "instructblip": dataclasses.replace(
        _BLIP2, embeddings="qformer.embeddings", embeddings_norm="qformer.embeddings.layernorm"
    ),
}


def _dense(path: str, name: str) -> params.Table[Foreign]:
    return [
        (rf"{path}/kernel", Foreign(f"{name}.weight", linear())),
        (rf"{path}/bias", Foreign(f"{name}.bias", as_is())),
    ]


def _norm(path: str, name: str) -> params.Table[Foreign]:
    return [
        (rf"{path}/scale", Foreign(f"{name}.weight", as_is())),
        (rf"{path}/bias", Foreign(f"{name}.bias", as_is())),
    ]


def _attention(path: str, name: str, projections: str, attention: str) -> params.Table[Foreign]:
    """An attention module with its output and norm; `projections` are those of query, key, value that it holds."""
    inside, output = f"{name}.{attention}.{{0}}", f"{name}.output"
    return [
        (rf"{path}/({projections})/kernel", Foreign(f"{inside}.weight", linear())),
        (rf"{path}/({projections})/bias", Foreign(f"{inside}.bias", flat())),
        (rf"{path}/output/kernel", Foreign(f"{output}.dense.weight", linear(inputs=2))),
        (rf"{path}/output/bias", Foreign(f"{output}.dense.bias", as_is())),
        *_norm(rf"{path}/norm", f"{output}.LayerNorm"),
    ]


def _feed_forward(path: str, layer: str, suffix: str) -> params.Table[Foreign]:
    return [
        *_dense(rf"{path}/intermediate", f"{layer}.intermediate{suffix}.dense"),
        *_dense(rf"{path}/output", f"{layer}.output{suffix}.dense"),
        *_norm(rf"{path}/norm", f"{layer}.output{suffix}.LayerNorm"),
    ]


def table(d: Dialect) -> params.Table[Foreign]:
    """Rows for the trainable trees of both stages; `params.relevant` picks those that a tree needs."""
    layer = f"{d.layers}.{{layer}}"
    image = f"{layer}.crossattention.{d.attention}.{{0}}"
    return [
        (r"qformer/query_tokens", Foreign("query_tokens", as_is())),
        (r"qformer/(word|position)_embeddings/embedding", Foreign(f"{d.embeddings}.{{0}}_embeddings.weight", as_is())),
        *_norm(r"qformer/embeddings_norm", d.embeddings_norm),
        *_attention(_LAYER + "attention", f"{layer}.attention", "query|key|value", d.attention),
        *_attention(_LAYER + "cross_attention", f"{layer}.crossattention", "query", d.attention),
        # Ours hold the keys and values of every cross-attention in one matrix, so that an image is projected at once.
        (r"qformer/image_projection/(key|value)/kernel", Foreign(f"{image}.weight", linear(), stacked=1)),
        (r"qformer/image_projection/(key|value)/bias", Foreign(f"{image}.bias", flat())),
        *_feed_forward(_LAYER + "query_mlp", layer, d.query_suffix),
        *_feed_forward(_LAYER + "text_mlp", layer, ""),
        *_norm(r"ln_vision/norm", d.ln_vision),
        *_dense(r"vision_proj", d.vision_proj),
        *_dense(r"text_proj", d.text_proj),
        *_dense(r"itm_head", "itm_head"),
        *_dense(r"language_projection", d.language_projection),
        *_dense(r"qformer/lm_head/dense", f"{d.language_head}.transform.dense"),
        *_norm(r"qformer/lm_head/norm", f"{d.language_head}.transform.LayerNorm"),
        (r"qformer/lm_head/bias", Foreign(f"{d.language_head}.bias", as_is())),
        (r"temperature", Foreign(d.temperature, as_is())),
    ]


def layers_of(config: QFormerConfig, path: str) -> Sequence[int] | int | None:
    """The foreign layers that a parameter stacks (scanned groups, image projections), the one it is, or None."""
    every, groups = config.cross_attention_every, config.scanned_groups
    if "image_projection/" in path:
        return range(0, config.layers, every)
    if match := re.search(r"groups/layer_(\d+)/", path):
        return range(int(match[1]), groups * every, every)
    if match := re.search(r"tail/layer_(\d+)/", path):
        return groups * every + int(match[1])
    return None
