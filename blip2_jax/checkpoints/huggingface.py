"""Hugging Face directories: config.json beside one or many weight files."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from blip2_jax.checkpoints.mapping import Tensors
from blip2_jax.checkpoints.torch_file import TorchFile


class Directory:
    """The configuration and the tensors of a model directory; a tensor is read from disk when it is asked for.

    Attributes:
      path: of the directory.
      where: the same, for messages.
      files: the weight files, whose content is the model's identity.
    """

    def __init__(self, path: str | pathlib.Path):
        """Open the weights: the shards that an index names, else *.safetensors, else pytorch_model*.bin.

        Raises:
          FileNotFoundError: no directory, no weights, or a shard is missing.
          ValueError: a file is damaged, or does not hold what the index says.
        """
        self.path = pathlib.Path(path)
        self.where = str(self.path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is not a directory; expected one with config.json and *.safetensors")
        self.files = self._weight_files()
        self._tensors: dict[str, Any] = {}
        self._pickled = TorchFile(*self.files) if self.files[0].suffix == ".bin" else None
        for file in self.files if self._pickled is None else ():
            try:
                handle = safe_open(file, framework="numpy")
            except SafetensorError as error:
                raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error
            self._tensors |= dict.fromkeys(handle.keys(), handle)

    def _weight_files(self) -> list[pathlib.Path]:
        for pattern in ("*.safetensors", "pytorch_model*.bin"):
            indices = sorted(self.path.glob(f"{pattern}.index.json"))
            if indices:
                named = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
                missing = [name for name in named if not (self.path / name).exists()]
                if missing:
                    raise FileNotFoundError(
                        f"{self.path}: {indices[0].name} names {len(named)} files, and {', '.join(missing)} "
                        "is not there: fetch it again"
                    )
                return [self.path / name for name in named]
            files = sorted(self.path.glob(pattern))
            if files:
                return files
        raise FileNotFoundError(f"{self.path}: no *.safetensors file and no pytorch_model*.bin")

    def config(self) -> dict[str, Any]:
        file = self.path / "config.json"
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: it holds the sizes of the model")
        return json.loads(file.read_text())

    def names(self) -> list[str]:
        return self._pickled.names() if self._pickled else list(self._tensors)

    def read(self, name: str) -> np.ndarray:
        return self._pickled.read(name) if self._pickled else self._tensors[name].get_tensor(name)


class Part:
    """The tensors whose names begin with a prefix, without it: a model inside a larger one."""

    def __init__(self, whole: Tensors, prefix: str):
        self._whole, self._prefix = whole, prefix
        self.where = f"{whole.where} ({prefix}*)" if prefix else whole.where

    def names(self) -> list[str]:
        return [n.removeprefix(self._prefix) for n in self._whole.names() if n.startswith(self._prefix)]

    def read(self, name: str) -> np.ndarray:
        return self._whole.read(self._prefix + name)


def part(whole: Tensors, anchor: str, prefixes: tuple[str, ...]) -> Part:
    """The part that begins with the first of `prefixes` behind which there is a tensor `anchor`.

    Raises:
      ValueError: behind none of them.
    """
    known = set(whole.names())
    for prefix in prefixes:
        if prefix + anchor in known:
            return Part(whole, prefix)
    tried = ", ".join(repr(prefix + anchor) for prefix in prefixes)
    raise ValueError(f"{whole.where}: not the model that was asked for, it has none of the tensors {tried}")
