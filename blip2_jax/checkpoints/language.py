"""Language models from Hugging Face directories: sizes from their config.json, weights by path table."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from blip2_jax import params
from blip2_jax.checkpoints import mapping
from blip2_jax.checkpoints.huggingface import part_of, with_ties
from blip2_jax.checkpoints.mapping import Foreign, Tensors, as_is, flat, linear
from blip2_jax.models.language.decoder import DecoderConfig
from blip2_jax.models.language.llama import Llama, LlamaConfig, Rope
from blip2_jax.models.language.opt import OPT, OPTConfig
from blip2_jax.models.language.t5 import T5, T5Config


class Family(NamedTuple):
    """How the models of a model_type are read.

    Attributes:
      module: the Flax module.
      config: config.json -> the module's config.
      table: config -> rows for the module's tree.
      layers: config and path -> the layers that a parameter stacks, or None.
      anchor: a tensor that each of them has, to find the model inside a larger one.
      aside: tensors that are left out, with the reason.
      ties: tensors that a file may lack because they are the same as another: {left out: the other}.
    """

    module: type[nn.Module]
    config: Callable[[dict[str, Any]], Any]
    table: Callable[[Any], params.Table[Foreign]]
    layers: Callable[[Any, str], range | None]
    anchor: str
    aside: params.Table[str]
    ties: Mapping[str, str] = MappingProxyType({})


def _expect(config: dict[str, Any], **values: Any) -> None:
    """Raise ValueError where a config.json asks for what our module does not do."""
    for name, value in values.items():
        found = config.get(name, value)
        if found != value:
            raise ValueError(f"{config.get('model_type')} with {name} = {found!r} is not supported, only {value!r}")


def _decoder_layers(config: DecoderConfig, path: str) -> range | None:
    return range(config.layers) if path.startswith("layers/") else None


# The Llama family.


def rope(config: dict[str, Any]) -> Rope:
    """Rotary frequencies from a config.json, in the words of transformers 4 (rope_theta, rope_scaling) or 5."""
    known = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = known.get("rope_type", known.get("type", "default"))
    theta = config.get("rope_theta") or known.get("rope_theta", 10_000.0)
    if kind == "default":
        return Rope(theta)
    factor = known["factor"]
    original = known.get("original_max_position_embeddings") or config["max_position_embeddings"]
    if kind == "linear":
        return Rope(theta, kind, factor)
    if kind == "llama3":
        return Rope(theta, kind, factor, original, known["low_freq_factor"], known["high_freq_factor"])
    if kind == "yarn":
        _expect({"model_type": "yarn scaling", **known}, mscale=None, mscale_all_dim=None, truncate=True)
        attention = known.get("attention_factor") or (0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0)
        slow, fast = known.get("beta_slow") or 1.0, known.get("beta_fast") or 32.0
        return Rope(theta, kind, factor, original, slow, fast, attention)
    raise ValueError(f"rotary scaling {kind!r} is not supported; expected default, linear, llama3 or yarn")


def llama_config(config: dict[str, Any], **changes: Any) -> LlamaConfig:
    """Sizes of a Llama or Qwen 2.5; `changes` replace single fields."""
    _expect(config, hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False)
    heads, width = config["num_attention_heads"], config["hidden_size"]
    fields = {
        "vocab_size": config["vocab_size"],
        "width": width,
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_size": config.get("head_dim") or width // heads,
        "mlp_width": config["intermediate_size"],
        "norm_epsilon": config["rms_norm_eps"],
        "tied_head": config.get("tie_word_embeddings", False),
        "rope": rope(config),
        "qkv_bias": config["model_type"] == "qwen2",
    }
    return LlamaConfig(**(fields | changes))


def _llama_table(config: LlamaConfig) -> params.Table[Foreign]:
    layer = "model.layers.{layer}."
    rows = [
        (r"embeddings/embedding", Foreign("model.embed_tokens.weight", as_is())),
        (r"layers/(query|key|value)/kernel", Foreign(layer + "self_attn.{0[0]}_proj.weight", linear())),
        (r"layers/output/kernel", Foreign(layer + "self_attn.o_proj.weight", linear(inputs=2))),
        (r"layers/(gate|up|down)/kernel", Foreign(layer + "mlp.{0}_proj.weight", linear())),
        (r"layers/attention_norm/scale", Foreign(layer + "input_layernorm.weight", as_is())),
        (r"layers/mlp_norm/scale", Foreign(layer + "post_attention_layernorm.weight", as_is())),
        (r"norm/scale", Foreign("model.norm.weight", as_is())),
    ]
    if config.qkv_bias:
        rows.append((r"layers/(query|key|value)/bias", Foreign(layer + "self_attn.{0[0]}_proj.bias", flat())))
    if not config.tied_head:
        rows.append((r"lm_head/embedding", Foreign("lm_head.weight", as_is())))
    return rows


_LLAMA = Family(
    Llama,
    llama_config,
    _llama_table,
    _decoder_layers,
    "model.embed_tokens.weight",
    [
        (r"lm_head\.weight", "tied to the word embeddings"),
        (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "a buffer"),
    ],
)


# OPT.


def opt_config(config: dict[str, Any], **changes: Any) -> OPTConfig:
    """Sizes of an OPT; `changes` replace single fields."""
    width = config["hidden_size"]
    _expect(
        config,
        do_layer_norm_before=True,
        enable_bias=True,
        layer_norm_elementwise_affine=True,
        word_embed_proj_dim=width,
        activation_function="relu",
        _remove_final_layer_norm=False,
    )
    heads = config["num_attention_heads"]
    fields = {
        "vocab_size": config["vocab_size"],
        "width": width,
        "layers": config["num_hidden_layers"],
        "heads": heads,
        "kv_heads": heads,
        "head_size": width // heads,
        "mlp_width": config["ffn_dim"],
        "tied_head": config.get("tie_word_embeddings", True),
        "max_positions": config["max_position_embeddings"],
        "dropout": config.get("dropout", 0.1),
        "attention_dropout": config.get("attention_dropout", 0.0),
    }
    return OPTConfig(**(fields | changes))


def _opt_table(config: OPTConfig) -> params.Table[Foreign]:
    root = "model.decoder."
    layer = root + "layers.{layer}."
    norms = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}
    rows = [
        (r"embeddings/embedding", Foreign(root + "embed_tokens.weight", as_is())),
        (r"position_embeddings/embedding", Foreign(root + "embed_positions.weight", as_is())),
        (r"layers/(query|key|value)/kernel", Foreign(layer + "self_attn.{0[0]}_proj.weight", linear())),
        (r"layers/(query|key|value)/bias", Foreign(layer + "self_attn.{0[0]}_proj.bias", flat())),
        (r"layers/output/kernel", Foreign(layer + "self_attn.out_proj.weight", linear(inputs=2))),
        (r"layers/output/bias", Foreign(layer + "self_attn.out_proj.bias", as_is())),
        (r"norm/scale", Foreign(root + "final_layer_norm.weight", as_is())),
        (r"norm/bias", Foreign(root + "final_layer_norm.bias", as_is())),
    ]
    for path, name in norms.items():
        rows.append((rf"layers/{path}/scale", Foreign(f"{layer}{name}.weight", as_is())))
        rows.append((rf"layers/{path}/bias", Foreign(f"{layer}{name}.bias", as_is())))
    for path, name in {"up": "fc1", "down": "fc2"}.items():
        rows.append((rf"layers/{path}/kernel", Foreign(f"{layer}{name}.weight", linear())))
        rows.append((rf"layers/{path}/bias", Foreign(f"{layer}{name}.bias", as_is())))
    if not config.tied_head:
        rows.append((r"lm_head/embedding", Foreign("lm_head.weight", as_is())))
    return rows


_OPT = Family(
    OPT,
    opt_config,
    _opt_table,
    _decoder_layers,
    "model.decoder.embed_tokens.weight",
    [(r"lm_head\.weight", "tied to the word embeddings")],
)


# T5.


def t5_config(config: dict[str, Any], **changes: Any) -> T5Config:
    """Sizes of a T5 v1.1 or Flan-T5; `changes` replace single fields, such as activation="gelu" for LAVIS's weights."""
    _expect({"feed_forward_proj": "relu", **config}, feed_forward_proj="gated-gelu", scale_decoder_outputs=False)
    # Of itself "gated-gelu" means the tanh approximation.
    activation = config.get("dense_act_fn", "gelu_new")
    if activation not in ("gelu", "gelu_new"):
        raise ValueError(f"t5 with dense_act_fn = {activation!r} is not supported, only 'gelu' and 'gelu_new'")
    fields = {
        "vocab_size": config["vocab_size"],
        "width": config["d_model"],
        "encoder_layers": config["num_layers"],
        "decoder_layers": config.get("num_decoder_layers") or config["num_layers"],
        "heads": config["num_heads"],
        "head_size": config["d_kv"],
        "mlp_width": config["d_ff"],
        "activation": "gelu" if activation == "gelu" else "gelu_tanh",
        "buckets": config["relative_attention_num_buckets"],
        "max_distance": config.get("relative_attention_max_distance", 128),
        "norm_epsilon": config["layer_norm_epsilon"],
        "dropout": config.get("dropout_rate", 0.1),
    }
    return T5Config(**(fields | changes))


def _t5_table(config: T5Config) -> params.Table[Foreign]:
    rows = [
        (r"embeddings/embedding", Foreign("shared.weight", as_is())),
        (r"lm_head/embedding", Foreign("lm_head.weight", as_is())),
    ]
    for side, last in (("encoder", 1), ("decoder", 2)):
        block = f"{side}.block.{{layer}}.layer."
        attention, mlp = block + "0.SelfAttention.", block + f"{last}."
        rows += [
            (rf"{side}/attention/(query|key|value)/kernel", Foreign(attention + "{0[0]}.weight", linear())),
            (rf"{side}/attention/output/kernel", Foreign(attention + "o.weight", linear(inputs=2))),
            (rf"{side}/attention/norm/scale", Foreign(block + "0.layer_norm.weight", as_is())),
            (rf"{side}/mlp/gate/kernel", Foreign(mlp + "DenseReluDense.wi_0.weight", linear())),
            (rf"{side}/mlp/up/kernel", Foreign(mlp + "DenseReluDense.wi_1.weight", linear())),
            (rf"{side}/mlp/down/kernel", Foreign(mlp + "DenseReluDense.wo.weight", linear())),
            (rf"{side}/mlp/norm/scale", Foreign(mlp + "layer_norm.weight", as_is())),
            (rf"{side}_norm/scale", Foreign(f"{side}.final_layer_norm.weight", as_is())),
            (
                rf"{side}_bias/buckets/embedding",
                Foreign(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", as_is()),
            ),
        ]
    cross = "decoder.block.{layer}.layer.1."
    return [
        *rows,
        (r"decoder/cross_attention/query/kernel", Foreign(cross + "EncDecAttention.q.weight", linear())),
        (r"encoder_projection/(key|value)/kernel", Foreign(cross + "EncDecAttention.{0[0]}.weight", linear())),
        (r"decoder/cross_attention/output/kernel", Foreign(cross + "EncDecAttention.o.weight", linear(inputs=2))),
        (r"decoder/cross_attention/norm/scale", Foreign(cross + "layer_norm.weight", as_is())),
    ]


def _t5_layers(config: T5Config, path: str) -> range | None:
    if path.startswith("encoder/"):
        return range(config.encoder_layers)
    return range(config.decoder_layers) if path.startswith(("decoder/", "encoder_projection/")) else None


_T5 = Family(
    T5,
    t5_config,
    _t5_table,
    _t5_layers,
    "shared.weight",
    [
        (r"(encoder|decoder)\.embed_tokens\.weight", "the same as shared.weight"),
        (r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight", "never used"),
    ],
    # The head is one of its own in what was published, and not in what transformers makes anew.
    {"lm_head.weight": "shared.weight"},
)

FAMILIES: dict[str, Family] = {"llama": _LLAMA, "qwen2": _LLAMA, "opt": _OPT, "t5": _T5}


def own_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json: of its own, or of the BLIP-2 around it."""
    return config.get("text_config", config)


def family(config: dict[str, Any]) -> Family:
    """The family of a language model's config.json.

    Raises:
      ValueError: its model_type is not known.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"the language model's model_type is {kind!r}; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def tensors(family: Family, whole: Tensors) -> Tensors:
    """A language model's tensors: those of its own file, or of the BLIP-2 around it.

    Raises:
      ValueError: there is no such model in it.
    """
    return with_ties(part_of(whole, family.anchor, ("", "language_model.")), family.ties)


def initialize(model: nn.Module, key: jax.Array) -> params.Tree:
    """A newly initialised tree of a language model."""
    return model.init(key, jnp.zeros((1, 2), jnp.int32), method="initialize")["params"]


def shapes(model: nn.Module, dtype: Any = None) -> params.Tree:
    """The tree of a language model without its values."""
    return mapping.template(functools.partial(initialize, model), dtype)
