"""A Q-Former from a BERT checkpoint of any size, as the paper's (section 3.1).

Everything that BERT has is taken over, the feed-forward networks twice (queries start with a copy of the text's); what
it lacks starts as in a new model: cross-attention, query tokens, the [DEC] row of the vocabulary.
"""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from blip2_jax import params
from blip2_jax.checkpoints.huggingface import Directory
from blip2_jax.checkpoints.mapping import From, as_is, load, transposed
from blip2_jax.models.qformer import QFormerConfig

_LAYER = r"transformer/(?:groups|tail)/layer_\d+/"
_TABLE = [
    (r"embeddings_norm/scale", From("embeddings.LayerNorm.weight", as_is)),
    (r"embeddings_norm/bias", From("embeddings.LayerNorm.bias", as_is)),
    (r"position_embeddings/embedding", From("embeddings.position_embeddings.weight", as_is)),
    (
        _LAYER + r"attention/(query|key|value)/kernel",
        From("encoder.layer.{layer}.attention.self.{0}.weight", transposed),
    ),
    (_LAYER + r"attention/(query|key|value)/bias", From("encoder.layer.{layer}.attention.self.{0}.bias", as_is)),
    (_LAYER + r"attention/output/kernel", From("encoder.layer.{layer}.attention.output.dense.weight", transposed)),
    (_LAYER + r"attention/output/bias", From("encoder.layer.{layer}.attention.output.dense.bias", as_is)),
    (_LAYER + r"attention/norm/scale", From("encoder.layer.{layer}.attention.output.LayerNorm.weight", as_is)),
    (_LAYER + r"attention/norm/bias", From("encoder.layer.{layer}.attention.output.LayerNorm.bias", as_is)),
    (
        _LAYER + r"(?:query|text)_mlp/intermediate/kernel",
        From("encoder.layer.{layer}.intermediate.dense.weight", transposed),
    ),
    (_LAYER + r"(?:query|text)_mlp/intermediate/bias", From("encoder.layer.{layer}.intermediate.dense.bias", as_is)),
    (_LAYER + r"(?:query|text)_mlp/output/kernel", From("encoder.layer.{layer}.output.dense.weight", transposed)),
    (_LAYER + r"(?:query|text)_mlp/output/bias", From("encoder.layer.{layer}.output.dense.bias", as_is)),
    (_LAYER + r"(?:query|text)_mlp/norm/scale", From("encoder.layer.{layer}.output.LayerNorm.weight", as_is)),
    (_LAYER + r"(?:query|text)_mlp/norm/bias", From("encoder.layer.{layer}.output.LayerNorm.bias", as_is)),
]
_LANGUAGE_HEAD = [
    (r"lm_head/dense/kernel", From("cls.predictions.transform.dense.weight", transposed)),
    (r"lm_head/dense/bias", From("cls.predictions.transform.dense.bias", as_is)),
    (r"lm_head/norm/scale", From("cls.predictions.transform.LayerNorm.weight", as_is)),
    (r"lm_head/norm/bias", From("cls.predictions.transform.LayerNorm.bias", as_is)),
]
# Grown by the row of [DEC], which keeps its fresh value.
_GROWN = {
    r"word_embeddings/embedding": "embeddings.word_embeddings.weight",
    r"lm_head/bias": "cls.predictions.bias",
}
_FRESH = (r"query_tokens", r"image_projection/.*", r".*/cross_attention/.*")


class _Unprefixed:
    """The tensors of a BERT saved alone ("embeddings...") or inside a task model ("bert.embeddings...")."""

    def __init__(self, directory: Directory):
        self.where = directory.where
        self._directory = directory
        self._names = {name.removeprefix("bert."): name for name in directory.names()}

    def names(self) -> list[str]:
        return list(self._names)

    def read(self, name: str) -> np.ndarray:
        return self._directory.read(self._names[name])


def qformer_config(bert: dict[str, Any], **changes: Any) -> QFormerConfig:
    """Sizes of the Q-Former that a BERT of this config.json becomes; `changes` replace single fields."""
    if bert.get("model_type") != "bert" or bert.get("hidden_act") != "gelu":
        raise ValueError(
            f"expected a BERT with exact GELU, found model_type {bert.get('model_type')!r} and hidden_act "
            f"{bert.get('hidden_act')!r}: name a BERT directory in config.bert"
        )
    fields = {
        "width": bert["hidden_size"],
        "layers": bert["num_hidden_layers"],
        "heads": bert["num_attention_heads"],
        "mlp_width": bert["intermediate_size"],
        "vocab_size": bert["vocab_size"] + 1,
        "max_positions": bert["max_position_embeddings"],
        "norm_epsilon": bert["layer_norm_eps"],
        "dropout": bert["hidden_dropout_prob"],
        "attention_dropout": bert["attention_probs_dropout_prob"],
    }
    config = QFormerConfig(**(fields | changes))
    if config.layers > bert["num_hidden_layers"]:
        raise ValueError(f"a Q-Former of {config.layers} layers from a BERT of {bert['num_hidden_layers']}")
    return config


def qformer_layers(path: str, config: QFormerConfig) -> list[int] | int | None:
    """The BERT layers that a Q-Former parameter stacks (scanned groups), the one it is (the tail), or None."""
    every, groups = config.cross_attention_every, config.scanned_groups
    if match := re.search(r"groups/layer_(\d+)/", path):
        return [group * every + int(match[1]) for group in range(groups)]
    if match := re.search(r"tail/layer_(\d+)/", path):
        return groups * every + int(match[1])
    return None


def has_language_head(directory: Directory) -> bool:
    """Whether a BERT was saved with its masked-language head."""
    return "cls.predictions.transform.dense.weight" in directory.names()


def initialize_qformer(
    fresh: params.Tree, directory: Directory, config: QFormerConfig, keep_token_type: bool = False
) -> dict:
    """Replace in a freshly initialised Q-Former what BERT has.

    Args:
      fresh: float32 tree of `QFormer`, of stage 1 (with text) or stage 2 (queries alone).
      directory: a Hugging Face BERT, with or without its masked-language head.
      config: of the Q-Former.
      keep_token_type: add BERT's embedding of the first text segment to every position, so that text is encoded just
        as BERT does; the original drops it.

    Returns:
      A tree like `fresh`.
    """
    tensors = _Unprefixed(directory)
    has_head = has_language_head(directory)
    flat = params.flatten(fresh)
    taken, result = {}, {}
    for path, leaf in flat.items():
        grown = _GROWN.get(path)
        if any(re.fullmatch(pattern, path) for pattern in _FRESH) or (path.startswith("lm_head/") and not has_head):
            result[path] = leaf
        elif grown:
            old = tensors.read(grown)
            result[path] = jnp.concatenate([jnp.asarray(old, leaf.dtype), leaf[len(old) :]])
        else:
            taken[path] = leaf
    table = [row for row in _TABLE + _LANGUAGE_HEAD if any(re.fullmatch(row[0], path) for path in taken)]
    loaded = load(params.unflatten(taken), table, tensors, lambda path: qformer_layers(path, config))
    result |= params.flatten(loaded)
    if keep_token_type and "position_embeddings/embedding" in result:
        first_segment = tensors.read("embeddings.token_type_embeddings.weight")[0]
        result["position_embeddings/embedding"] = result["position_embeddings/embedding"] + first_segment
    return params.unflatten({path: result[path] for path in flat})
