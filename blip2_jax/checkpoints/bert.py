"""A Q-Former from a BERT checkpoint of any size, as the paper's (section 3.1).

Everything that BERT has is taken over, the feed-forward networks twice (queries start with a copy of the text's); what
it lacks starts as in a new model: cross-attention, query tokens, the [DEC] row of the vocabulary.
"""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp

from blip2_jax import params
from blip2_jax.checkpoints import mapping, qformer
from blip2_jax.checkpoints.huggingface import Directory, Renamed
from blip2_jax.models.qformer import QFormerConfig

# Grown by the row of [DEC], which keeps its fresh value.
_GROWN = {
    "qformer/word_embeddings/embedding": "embeddings.word_embeddings.weight",
    "qformer/lm_head/bias": "cls.predictions.bias",
}
_KINDS = ("bert", "blip_2_qformer", "instructblip_qformer")
_FRESH = r"qformer/(query_tokens|image_projection/.*|.*/cross_attention/.*)"


def _tensors(directory: Directory) -> Renamed:
    """Those of a BERT saved alone ("embeddings...") or inside a task model ("bert.embeddings...").

    The oldest files, Google's own among them, call the scale of a norm gamma and its bias beta.
    """
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}

    def rename(name: str) -> str:
        name = name.removeprefix("bert.")
        return next((name.replace(a, b) for a, b in old.items() if name.endswith(a)), name)

    return Renamed(directory, {new: name for name in directory.names() if (new := rename(name)) is not None})


def qformer_config(config: dict[str, Any], **changes: Any) -> QFormerConfig:
    """Sizes of the Q-Former that a BERT of this config.json becomes, or that a BLIP-2's config.json describes.

    `changes` replace single fields.
    """
    own = "qformer_config" in config
    config = config.get("qformer_config", config)
    if config.get("model_type") not in _KINDS or config.get("hidden_act") != "gelu":
        raise ValueError(
            f"expected a BERT with exact GELU, found model_type {config.get('model_type')!r} and hidden_act "
            f"{config.get('hidden_act')!r}: name a BERT directory in config.bert"
        )
    fields = {
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "mlp_width": config["intermediate_size"],
        "vocab_size": config["vocab_size"] + (not own),
        "max_positions": config["max_position_embeddings"],
        "norm_epsilon": config["layer_norm_eps"],
        "dropout": config["hidden_dropout_prob"],
        "attention_dropout": config["attention_probs_dropout_prob"],
    }
    result = QFormerConfig(**(fields | changes))
    if result.layers > config["num_hidden_layers"]:
        raise ValueError(f"a Q-Former of {result.layers} layers from a BERT of {config['num_hidden_layers']}")
    return result


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
    tensors = _tensors(directory)
    has_head = has_language_head(directory)
    taken, result = {}, {}
    for path, leaf in params.flatten({"qformer": fresh}).items():
        if re.fullmatch(_FRESH, path) or (path.startswith("qformer/lm_head/") and not has_head):
            result[path] = leaf
        elif path in _GROWN:
            old = tensors.read(_GROWN[path])
            result[path] = jnp.concatenate([jnp.asarray(old, leaf.dtype), leaf[len(old) :]])
        else:
            taken[path] = leaf
    template = params.unflatten(taken)
    table = params.relevant(qformer.table(qformer.BERT), template)
    mapped = mapping.resolve(template, table, lambda path: qformer.layers_of(config, path))
    result |= params.flatten(mapping.load(template, mapped, tensors))
    positions = "qformer/position_embeddings/embedding"
    if keep_token_type and positions in result:
        result[positions] = result[positions] + tensors.read("embeddings.token_type_embeddings.weight")[0]
    order = params.flatten({"qformer": fresh})
    return params.unflatten({path: result[path] for path in order})["qformer"]
