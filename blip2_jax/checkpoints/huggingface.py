"""Hugging Face directories: config.json beside one or many .safetensors files."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open


class Directory:
    """The configuration and the tensors of a model directory; a tensor is read from disk when it is asked for."""

    def __init__(self, path: str | pathlib.Path):
        self.path = pathlib.Path(path)
        self.where = str(self.path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is not a directory; expected one with config.json and *.safetensors")
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{self.path}: no *.safetensors file")
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="numpy")
            except SafetensorError as error:
                raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error
            self._files |= dict.fromkeys(handle.keys(), handle)

    @property
    def files(self) -> list[pathlib.Path]:
        """The weight files, whose content is the model's identity."""
        return sorted(self.path.glob("*.safetensors"))

    def config(self) -> dict[str, Any]:
        file = self.path / "config.json"
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: it holds the sizes of the model")
        return json.loads(file.read_text())

    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)
