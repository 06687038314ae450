"""Hugging Face directories: config.json beside one or many weight files."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from blip2_jax.checkpoints.mapping import Tensors
from blip2_jax.checkpoints.torch_file import TorchFile


class Directory:
    """The configuration and the tensors of a model directory; a tensor is read from disk when it is asked for.

    Attributes:
      path: of the directory.
      where: the same, for messages.
      files: the weight files, whose content is the model's identity.
    """

    def __init__(self, path: str | pathlib.Path, beside: str = ""):
        """Open the weights: the shards that an index names, else *.safetensors, else pytorch_model*.bin.

        Args:
          path: of the directory.
          beside: another file of tensors, which may be there.

        Raises:
          FileNotFoundError: no directory, no weights, or a shard is missing.
          ValueError: a file is damaged, or does not hold what the index says.
        """
        self.path = pathlib.Path(path)
        self.where = str(self.path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is not a directory; expected one with config.json and *.safetensors")
        self.files = self._weight_files()
        if beside and (self.path / beside).exists() and self.path / beside not in self.files:
            self.files.append(self.path / beside)
        self._tensors: dict[str, pathlib.Path] = {}
        self._pickled = TorchFile(*self.files) if self.files[0].suffix == ".bin" else None
        for file in self.files if self._pickled is None else ():
            try:
                with safe_open(file, framework="numpy") as handle:
                    self._tensors |= dict.fromkeys(handle.keys(), file)
            except SafetensorError as error:
                raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error

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
        """config.json as it is; `complete` adds what it leaves out.

        Raises:
          FileNotFoundError: there is none. ValueError: it is not JSON, or not of a model.
        """
        file = self.path / "config.json"
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: it holds the sizes of the model")
        try:
            return json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error

    def names(self) -> list[str]:
        return self._pickled.names() if self._pickled else list(self._tensors)

    def read(self, name: str) -> np.ndarray:
        if self._pickled:
            return self._pickled.read(name)
        # Opened anew each time: an open file keeps in memory all that was ever read of it.
        with safe_open(self._tensors[name], framework="numpy") as handle:
            return handle.get_tensor(name)


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the defaults of its model_type: those of the hub hold little more than what differs."""
    # Here and not above: it takes seconds, and imports torch where that is installed.
    from transformers import CONFIG_MAPPING, AutoConfig

    if config.get("model_type") not in CONFIG_MAPPING:
        return config
    return AutoConfig.for_model(**config).to_dict()


def load_tokenizer(directory: pathlib.Path) -> Tokenizer:
    """The tokenizer of a directory: tokenizer.json, or what transformers makes of older files.

    Raises:
      FileNotFoundError: there is none.
    """
    file = directory / "tokenizer.json"
    try:
        own = Tokenizer.from_file(str(file)) if file.exists() else _older_tokenizer(directory)
    except (OSError, ValueError, ImportError) as error:
        raise FileNotFoundError(
            f"{file} is missing, and transformers finds no tokenizer in other files there "
            f"({str(error).strip().splitlines()[0]}); expected one beside the weights"
        ) from error
    own.no_padding()
    own.no_truncation()
    return own


def _older_tokenizer(directory: pathlib.Path) -> Tokenizer:
    """What transformers makes of vocab.json and merges.txt, or of a SentencePiece model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory).backend_tokenizer


class Part:
    """A model inside a larger one: the tensors whose names begin with a prefix, by names that begin otherwise."""

    def __init__(self, whole: Tensors, prefix: str, becomes: str = ""):
        self.where = f"{whole.where} ({prefix}*)" if prefix else whole.where
        self._whole = whole
        self._names = {becomes + name.removeprefix(prefix): name for name in whole.names() if name.startswith(prefix)}

    def names(self) -> list[str]:
        return list(self._names)

    def read(self, name: str) -> np.ndarray:
        return self._whole.read(self._names[name])


def part_of(whole: Tensors, anchor: str, prefixes: Sequence[str]) -> Part:
    """The part that begins with the first of `prefixes` behind which there is a tensor `anchor`.

    Files of a bare model ("decoder.x" where others have "model.decoder.x") lack the beginning of every name.

    Raises:
      ValueError: behind none of them.
    """
    known = set(whole.names())
    for prefix in prefixes:
        if prefix + anchor in known:
            return Part(whole, prefix)
    beginning, _, rest = anchor.partition(".")
    if rest in known:
        return Part(whole, "", becomes=f"{beginning}.")
    tried = ", ".join(repr(prefix + anchor) for prefix in prefixes)
    raise ValueError(f"{whole.where}: not the model that was asked for, it has none of the tensors {tried}")
