"""Tiny random models of transformers' own, saved as it saves them; needs torch when it is called."""

from __future__ import annotations

import pathlib
from typing import Any

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TOWER = TINY | {"image_size": 28, "patch_size": 7}
LLAMA = TINY | {"vocab_size": 90, "num_key_value_heads": 2, "max_position_embeddings": 64}
OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48}
T5 = {"d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 3, "num_heads": 4, "vocab_size": 90}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}

TOWERS = {
    "CLIP": ("CLIPVisionModel", "CLIPVisionConfig", TOWER),
    "SigLIP": ("SiglipVisionModel", "SiglipVisionConfig", TOWER),
    "BLIP-2": ("Blip2VisionModel", "Blip2VisionConfig", TOWER | {"layer_norm_eps": 1e-6}),
}
LANGUAGE = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "Llama, linear": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"rope_scaling": LINEAR}),
    "Llama 3": (
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}, "tie_word_embeddings": True},
    ),
    "Llama, yarn": ("LlamaForCausalLM", "LlamaConfig", LLAMA | {"rope_scaling": YARN}),
    "Qwen 2.5": ("Qwen2ForCausalLM", "Qwen2Config", LLAMA),
    "OPT": ("OPTForCausalLM", "OPTConfig", OPT | {"vocab_size": 90, "max_position_embeddings": 64}),
    "Flan-T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}


def saved(kind: str, config: str, sizes: dict[str, Any], folder: pathlib.Path, file_size: str = "1GB"):
    """A random model of transformers', its small initialisation made large, saved as it saves."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=file_size)
    return model
