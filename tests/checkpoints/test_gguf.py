"""A GGUF file becomes the Hugging Face directory that it was made from."""

import json

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from blip2_jax.checkpoints import frozen
from blip2_jax.checkpoints import gguf as ours
from blip2_jax.checkpoints.huggingface import Directory
from blip2_jax.checkpoints.language import llama_config
from tests import tiny

NAMES = {ours: theirs for theirs, ours in ours._LAYER_NAMES.items()}


def halves_to_interleaved(weight, heads):
    """What llama.cpp's converter does to query and key rows: halves of a head become neighbouring pairs."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_gguf(directory, file, pre_tokenizer="smollm", architecture="llama"):
    """A GGUF of the tiny Llama, with the library of the format itself."""
    source = Directory(directory)
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_context_length(64)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    for name in source.names():
        array = source.read(name)
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            part, kind = rest.rsplit(".", 1)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config["num_attention_heads" if "q_proj" in part else "num_key_value_heads"]
                array = halves_to_interleaved(array, heads)
            writer.add_tensor(f"blk.{layer}.{NAMES[part]}.{kind}", array)
        else:
            known = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
            writer.add_tensor(known.get(name, "output.weight"), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_there_and_back(tmp_path, tied):
    original = tiny.llama(tmp_path / "original", tied=tied)
    write_gguf(original, tmp_path / "model.gguf")
    ours.convert(tmp_path / "model.gguf", tmp_path / "converted")
    before, after = Directory(original), Directory(tmp_path / "converted")
    assert sorted(before.names()) == sorted(after.names())
    for name in before.names():
        np.testing.assert_array_equal(before.read(name), after.read(name), err_msg=name)
    old, new = llama_config(before.config()), llama_config(after.config())
    assert old == new
    assert new.tied_head == tied
    part = frozen.find("llm", f"hf:{tmp_path / 'converted'}")
    frozen.load_language_model(part, frozen.language_model(part, np.float32), np.float32)


def test_the_tokenizer_keeps_digits_apart(tmp_path):
    original = tiny.llama(tmp_path / "original")
    write_gguf(original, tmp_path / "model.gguf")
    ours.convert(tmp_path / "model.gguf", tmp_path / "converted")
    tokenizer = Tokenizer.from_file(str(tmp_path / "converted" / "tokenizer.json"))
    encoding = tokenizer.encode("a red square 12<|im_end|>")
    assert encoding.tokens[-3:] == ["1", "2", "<|im_end|>"]
    assert tokenizer.decode(encoding.ids) == "a red square 12"


@pytest.mark.parametrize(
    ("content", "message"), [(b"hello, this is no model", "not a GGUF"), (b"", "not a GGUF")], ids=["text", "empty"]
)
def test_what_is_no_gguf(tmp_path, content, message):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ours.convert(tmp_path / "model.gguf", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_what_is_no_llama_leaves_nothing_behind(tmp_path):
    write_gguf(tiny.llama(tmp_path / "original"), tmp_path / "model.gguf", pre_tokenizer="qwen2")
    with pytest.raises(ValueError, match="'gpt2' with pre-tokenizer 'qwen2'; only"):
        ours.convert(tmp_path / "model.gguf", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
