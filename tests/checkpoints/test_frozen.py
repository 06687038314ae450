"""Frozen parts: named by one string, identified by their content."""

import jax
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from blip2_jax.checkpoints import frozen, hub
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
        frozen.find("llm", f"hf:{tmp_path / 'none'}").config()
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        frozen.find("llm", f"hf:{tmp_path}").config()
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        frozen.find("llm", f"hf:{tmp_path}").config()


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
    assert part.config()["hidden_size"] == 2560  # Its sizes are known all the same.
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
