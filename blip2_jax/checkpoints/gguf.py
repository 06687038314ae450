"""A GGUF file (llama.cpp's format) of a Llama becomes a Hugging Face directory, so that one loader serves both.

Two things differ. Llama.cpp rotates neighbouring pairs of a head where Hugging Face rotates its halves, so it keeps the
rows of the query and key matrices in another order. And the tokenizer is spread over the file's metadata.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def _huggingface_name(name: str) -> str:
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    part, kind = name.rsplit(".", 1)
    return f"{whole[part]}.{kind}"


def _interleaved_to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix [heads * d, D] from llama.cpp's rotary order to Hugging Face's."""
    rows, width = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(rows, width)


def _model_config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    get = lambda name: fields[f"llama.{name}"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "intermediate_size": get("feed_forward_length"),
        # Stored as float32: 9.99999974738e-06 was written as 1e-05.
        "rms_norm_eps": float(np.format_float_scientific(np.float32(get("attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(get("rope.freq_base")),
        "max_position_embeddings": get("context_length"),
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE as SmolLM's: digits apart, then GPT-2's words."""
    kind, words = fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]
    if (kind, words) != ("gpt2", "smollm"):
        raise ValueError(f"the GGUF tokenizer is {kind!r} with pre-tokenizer {words!r}; only gpt2 with smollm is known")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token, k in zip(tokens, kinds, strict=True) if k == _CONTROL_TOKEN]
    )
    return tokenizer


def convert(source: pathlib.Path, output: pathlib.Path) -> None:
    """Write config.json, model.safetensors (float32) and tokenizer.json of a Llama GGUF into `output`.

    The directory appears whole or not at all.

    Raises:
      ValueError: the file is not a GGUF, or not of a Llama.
    """
    import gguf  # Needed once, for the conversion; reading its result is not worth the import.

    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, IndexError) as error:
        raise ValueError(f"{source} is truncated or not a GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{source}: expected the architecture 'llama', found {architecture!r}")
    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}

    tensors = {}
    for tensor in tqdm(reader.tensors, desc=f"converting {source.name}", unit="tensor"):
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for part, count in heads.items():
            if f".{part}." in tensor.name:
                weight = _interleaved_to_halves(weight, count)
        tensors[_huggingface_name(tensor.name)] = np.ascontiguousarray(weight)

    partial = output.with_name(f"{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        config = _model_config(fields, tied="lm_head.weight" not in tensors)
        (partial / "config.json").write_text(json.dumps(config, indent=2))
        _tokenizer(fields).save(str(partial / "tokenizer.json"))
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
