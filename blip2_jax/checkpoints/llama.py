"""Llama-family weights from a Hugging Face directory."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from blip2_jax.checkpoints.huggingface import Directory
from blip2_jax.checkpoints.mapping import From, as_is, load, transposed
from blip2_jax.models.language.llama import Llama, LlamaConfig

_TABLE = [
    (r"embeddings/embedding", From("model.embed_tokens.weight", as_is)),
    (r"layers/(query|key|value)/kernel", From("model.layers.{layer}.self_attn.{0[0]}_proj.weight", transposed)),
    (r"layers/output/kernel", From("model.layers.{layer}.self_attn.o_proj.weight", transposed)),
    (r"layers/(gate|up|down)/kernel", From("model.layers.{layer}.mlp.{0}_proj.weight", transposed)),
    (r"layers/attention_norm/scale", From("model.layers.{layer}.input_layernorm.weight", as_is)),
    (r"layers/mlp_norm/scale", From("model.layers.{layer}.post_attention_layernorm.weight", as_is)),
    (r"norm/scale", From("model.norm.weight", as_is)),
]
_HEAD = (r"lm_head/embedding", From("lm_head.weight", as_is))


def llama_config(config: dict[str, Any], **changes: Any) -> LlamaConfig:
    """Sizes from a Hugging Face config.json; `changes` replace single fields."""
    if config.get("model_type") != "llama":
        raise ValueError(f"expected a Llama, found model_type {config.get('model_type')!r}")
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type", "default") != "default":
        raise ValueError(f"rotary scaling {scaling!r} is not supported")
    if config.get("attention_bias") or config.get("hidden_act", "silu") != "silu":
        raise ValueError("expected no attention bias and SiLU, as Llama has them")
    heads, width = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or {}
    fields = {
        "vocab_size": config["vocab_size"],
        "width": width,
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads", heads),
        "head_size": config.get("head_dim") or width // heads,
        "mlp_width": config["intermediate_size"],
        "norm_epsilon": config["rms_norm_eps"],
        "rope_theta": config.get("rope_theta") or rope.get("rope_theta", 10_000.0),
        "tied_head": config.get("tie_word_embeddings", False),
    }
    return LlamaConfig(**(fields | changes))


def load_llama(directory: Directory, config: LlamaConfig, dtype: jnp.dtype) -> dict:
    """The parameter tree of `Llama`, as numpy arrays of `dtype`."""
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda ids: Llama(config).init(jax.random.key(0), ids, method="initialize"), ids)["params"]
    template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    table = _TABLE if config.tied_head else [*_TABLE, _HEAD]
    stacked = list(range(config.layers))
    return load(template, table, directory, lambda path: stacked if re.match("layers/", path) else None)
