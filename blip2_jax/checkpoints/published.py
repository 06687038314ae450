"""Sizes of published models by name, so that a recipe can be looked at and planned without their weights.

They are what the config.json of each says beyond the defaults of its model_type in transformers.
"""

from __future__ import annotations

from typing import Any

from blip2_jax.checkpoints import vision
from blip2_jax.checkpoints.huggingface import complete


def _opt(width: int, **changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    return {"model_type": "opt", "num_hidden_layers": 32, "num_attention_heads": 32, **sizes, **changes}


def _flan_t5(width: int, mlp_width: int, heads: int, **changes: Any) -> dict[str, Any]:
    sizes = {"d_model": width, "d_kv": 64, "d_ff": mlp_width, "num_heads": heads, "num_layers": 24}
    fixed = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return {**fixed, **sizes, "vocab_size": 32128, **changes}


def _blip2(text: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"model_type": "blip-2", "text_config": text, **changes}


def _instructblip(text: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "instructblip", "text_config": text, "qformer_config": {"vocab_size": 30523}}


_VICUNA_7B = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_VICUNA_7B |= {"intermediate_size": 11008, "vocab_size": 32000}
# transformers' copies of T5 in BLIP-2 have exact GELU, as LAVIS; Flan-T5 itself has the tanh approximation.
_EXACT = {"dense_act_fn": "gelu"}

CONFIGS: dict[str, dict[str, Any]] = {
    "google-bert/bert-base-uncased": {"model_type": "bert"},
    "facebook/opt-2.7b": _opt(2560),
    "facebook/opt-6.7b": _opt(4096),
    "google/flan-t5-xl": _flan_t5(2048, 5120, 32),
    "google/flan-t5-xxl": _flan_t5(4096, 10240, 64),
    "lmsys/vicuna-7b-v1.1": _VICUNA_7B,
    "Salesforce/blip2-opt-2.7b": _blip2(_opt(2560, vocab_size=50304), image_token_index=50265),
    "Salesforce/blip2-opt-6.7b": _blip2(_opt(4096, vocab_size=50304), image_token_index=50265),
    "Salesforce/blip2-flan-t5-xl": _blip2(_flan_t5(2048, 5120, 32, **_EXACT), image_token_index=32100),
    "Salesforce/blip2-flan-t5-xxl": _blip2(_flan_t5(4096, 10240, 64, **_EXACT), image_token_index=32100),
    "Salesforce/blip2-itm-vit-g": _blip2(
        {"model_type": "opt"}, qformer_config={"vocab_size": 30523, "use_qformer_text_input": True}
    ),
    "Salesforce/instructblip-vicuna-7b": _instructblip(_VICUNA_7B | {"vocab_size": 32001}),
    "Salesforce/instructblip-flan-t5-xl": _instructblip(_flan_t5(2048, 5120, 32, **_EXACT)),
}
# By the names of LAVIS's files.
TOWERS = {"eva_vit_g.pth": vision.EVA_G, "clip_vit_L.pth": vision.CLIP_L}


def config(name: str) -> dict[str, Any]:
    """The whole config.json of a published model."""
    return complete(CONFIGS[name])
