"""Frozen parts: named by one string, identified by their content."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from blip2_jax.checkpoints import frozen, hub, vision
from blip2_jax.checkpoints.huggingface import load_tokenizer
from tests import tiny


def load_vision(source):
    part = frozen.find("vision", source)
    return frozen.load_vision(part, frozen.vision_encoder(part, 64, np.float32), np.float32)


def test_the_content_identifies_a_part(tmp_path):
    one = frozen.find("llm", f"hf:{tiny.llama(tmp_path / 'one')}")
    same = frozen.find("llm", f"hf:{tiny.llama(tmp_path / 'same')}")
    other = frozen.find("llm", f"hf:{tiny.llama(tmp_path / 'other', tied=False)}")
    assert one.sha256 == same.sha256 != other.sha256
    assert one.identity(np.float32) == {"source": one.source, "sha256": one.sha256, "dtype": "float32"}


def test_the_environment_says_where_not_what(tmp_path, monkeypatch):
    here = tiny.llama(tmp_path / "here")
    known = {"llm": frozen.find("llm", f"hf:{here}").identity(np.float32)}
    here.rename(tmp_path / "there")
    monkeypatch.setenv("BLIP2_JAX_FROZEN", f"llm={tmp_path / 'there'}")
    frozen.check({"llm": frozen.find("llm", f"hf:{here}")}, known, "checkpoint")
    monkeypatch.setenv("BLIP2_JAX_FROZEN", f"llm={tiny.llama(tmp_path / 'untied', tied=False)}")
    with pytest.raises(ValueError, match=r"checkpoint was trained with the llm .* BLIP2_JAX_FROZEN=llm=DIR"):
        frozen.check({"llm": frozen.find("llm", f"hf:{here}")}, known, "checkpoint")


@pytest.mark.parametrize("text", ["llm", "llm=", "audio=/tmp"])
def test_a_wrong_environment_is_an_error(text, monkeypatch):
    monkeypatch.setenv("BLIP2_JAX_FROZEN", text)
    with pytest.raises(ValueError, match="expected part=DIR"):
        frozen.find("llm", "nano:").path  # noqa: B018


@pytest.mark.parametrize(
    ("part", "source"), [("llm", "random:0"), ("vision", "random:x"), ("bert", "bert-base"), ("vision", "nano:big")]
)
def test_a_string_that_means_nothing(part, source):
    with pytest.raises(ValueError, match=rf"config\.{part} = '{source}': expected nano: or hf:DIR"):
        frozen.find(part, source)


def test_directories_that_hold_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        frozen.find("llm", f"hf:{tmp_path / 'none'}").config  # noqa: B018
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        frozen.find("llm", f"hf:{tmp_path}").tensors  # noqa: B018
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        frozen.find("llm", f"hf:{tmp_path}").tensors  # noqa: B018


def test_random_encoders_differ_by_seed():
    weights = [jax.tree.leaves(load_vision(f"random:{seed}")) for seed in (0, 0, 1)]
    assert all((a == b).all() for a, b in zip(weights[0], weights[1], strict=True))
    assert any((a != b).any() for a, b in zip(weights[0], weights[2], strict=True))


def test_another_encoder_than_its_config_says_is_refused(tmp_path):
    nano = frozen.find("vision", "nano:").path
    for file in nano.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("320", "384"))
    assert text.count("320") == 1
    with pytest.raises(ValueError, match=r"'block_15/project/bias' has shape \(320,\), but .* needs \(384,\)"):
        load_vision(f"hf:{tmp_path}")


def test_a_model_of_the_hub_that_is_not_here(monkeypatch):
    def nothing(name, allow_patterns):
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(hub, "snapshot_download", nothing)
    part = frozen.find("llm", "hf:facebook/opt-2.7b")
    assert part.config["hidden_size"] == 2560  # Its sizes are known all the same.
    with pytest.raises(
        ConnectionError, match=r"hf:facebook/opt-2\.7b is neither a directory .* `hf download facebook/"
    ):
        part.tensors  # noqa: B018


def test_a_model_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    asked = []

    def cached(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "snapshot")

    tiny.llama(tmp_path / "snapshot")
    monkeypatch.setattr(hub, "snapshot_download", cached)
    assert len(frozen.find("llm", "hf:some/llama").tensors.names()) == 20
    assert [name for name, _ in asked] == ["some/llama"]


def test_the_config_that_is_here_counts_not_the_published_one(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt", "hidden_size": 64}))
    monkeypatch.setattr(hub, "hf_hub_download", lambda name, file, local_files_only: str(tmp_path / file))
    assert frozen.find("llm", "hf:facebook/opt-2.7b").config["hidden_size"] == 64


def damaged(source, folder, file, content):
    """A copy of a directory with another file in it."""
    shutil.copytree(source, folder)
    (folder / file).write_text(content)
    return frozen.find("llm", f"hf:{folder}")


@pytest.mark.parametrize(
    ("file", "content", "look", "message"),
    [
        ("config.json", '{"model_type": "llama", "hidden', lambda part: part.config, r"config\.json is truncated"),
        (
            "config.json",
            '{"model_type": "llama", "hidden_size": "wide"}',
            lambda part: part.config,
            r"config\.json is no llama that transformers knows",
        ),
        ("tokenizer.json", '{"version": ', lambda part: load_tokenizer(part.path), r"tokenizer\.json is truncated"),
        ("model.safetensors.index.json", '{"weight', lambda part: part.tensors, r"index\.json is truncated"),
        ("model.safetensors.index.json", "{}", lambda part: part.tensors, r"no index of weight files"),
    ],
    ids=["config cut", "config of strings", "tokenizer cut", "index cut", "index empty"],
)
def test_damaged_files_are_named(tmp_path, file, content, look, message):
    with pytest.raises(ValueError, match=message):
        look(damaged(tiny.llama(tmp_path / "whole"), tmp_path / "cut", file, content))


@pytest.mark.torch
def test_files_of_pytorch(tmp_path):
    """The same weights as pytorch_model.bin, in one file and in two with an index; a list is no model."""
    import torch
    from safetensors.torch import load_file

    whole = tiny.llama(tmp_path / "whole")
    tensors = load_file(whole / "model.safetensors")
    names = sorted(tensors)
    for folder, parts in (("one", [names]), ("two", [names[:9], names[9:]])):
        shutil.copytree(whole, tmp_path / folder, ignore=shutil.ignore_patterns("*.safetensors"))
        files = ["pytorch_model.bin"] if len(parts) == 1 else [f"pytorch_model-{n}.bin" for n in range(2)]
        for file, part in zip(files, parts, strict=True):
            torch.save({name: tensors[name].bfloat16() for name in part}, tmp_path / folder / file)
        if len(files) > 1:
            placed = {name: file for file, part in zip(files, parts, strict=True) for name in part}
            (tmp_path / folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
        part = frozen.find("llm", f"hf:{tmp_path / folder}")
        model = frozen.language_model(part, np.float32)
        tree = frozen.load_language_model(part, model, np.float32)
        expected = tensors["model.embed_tokens.weight"].bfloat16().float().numpy()
        np.testing.assert_array_equal(tree["embeddings"]["embedding"], expected)
    torch.save([1, 2], tmp_path / "one" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds no tensors by name"):
        frozen.find("llm", f"hf:{tmp_path / 'one'}").tensors  # noqa: B018


@pytest.mark.torch
def test_a_tower_of_lavis(tmp_path, monkeypatch):
    """The golden towers as files: with the block that BLIP-2 does not use, EVA's behind a prefix, at another size."""
    import torch
    from safetensors.torch import load_file

    golden = pathlib.Path(__file__).parent.parent / "golden" / "lavis"
    sizes = json.loads((golden / "architecture.json").read_text())
    for kind, name, prefix in (("eva", "EVA_G", "visual_encoder."), ("clip", "CLIP_L", "visual.")):
        a, tower = sizes[f"vision_{kind}"], getattr(vision, name)
        config = dataclasses.replace(
            tower.config,
            width=a["width"],
            layers=a["depth"] - 1,
            heads=a["heads"],
            mlp_width=a["mlp_hidden"],
            patch=a["patch_size"],
        )
        monkeypatch.setattr(vision, name, tower._replace(config=config))
        tensors = load_file(golden / f"vit_{kind}" / "model.safetensors")
        torch.save({prefix + key: value.half() for key, value in tensors.items()}, tmp_path / f"{kind}.pth")
        part = frozen.find("vision", f"lavis:{tmp_path / kind}.pth")
        encoder = frozen.vision_encoder(part, 2 * a["image_size"], np.float32)
        weights = frozen.load_vision(part, encoder, np.float32)
        assert encoder.encode(weights, np.zeros((1, 56, 56, 3), np.uint8)).shape == (1, 17, a["width"])
    torch.save({"conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: a ViT of width 8 with patches of 7; expected width"):
        frozen.vision_encoder(frozen.find("vision", f"lavis:{tmp_path / 'other.pth'}"), 56, np.float32)
    with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist"):
        frozen.vision_encoder(frozen.find("vision", f"lavis:{tmp_path / 'none.pth'}"), 56, np.float32)
