"""Hugging Face directories: config.json beside one or many weight files."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
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
          ValueError: a file is damaged.
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
                named = sorted(set(_read_index(indices[0]).values()))
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
        """config.json as it is."""
        return read_config(self.path / "config.json")

    def names(self) -> list[str]:
        return self._pickled.names() if self._pickled else list(self._tensors)

    def read(self, name: str) -> np.ndarray:
        if self._pickled:
            return self._pickled.read(name)
        # Opened anew each time: an open file keeps in memory all that was ever read of it.
        with safe_open(self._tensors[name], framework="numpy") as handle:
            return handle.get_tensor(name)


def _read_index(file: pathlib.Path) -> dict[str, str]:
    """Which file each tensor is in."""
    try:
        named = json.loads(file.read_text())["weight_map"]
        elsewhere = [name for name in named.values() if name != pathlib.PurePath(name).name]
    except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is truncated or no index of weight files ({error}): fetch it again") from error
    if elsewhere:
        raise ValueError(f"{file} names the file {elsewhere[0]!r}: expected names of files beside it")
    return named


def read_config(file: pathlib.Path) -> dict[str, Any]:
    """A config.json as it is; `complete` adds what it leaves out.

    Raises:
      FileNotFoundError: there is none. ValueError: it is not JSON.
    """
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent} is not a directory; expected one with config.json and *.safetensors")
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: it holds the sizes of the model")
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is truncated or not JSON: {error}") from error


def complete(config: dict[str, Any], where: str = "config.json") -> dict[str, Any]:
    """A config.json with the defaults of its model_type: those of the hub hold little more than what differs.

    Raises:
      ValueError: transformers knows the model_type and refuses what the config says.
    """
    # Here and not above: it takes seconds, and imports torch where that is installed.
    from transformers import CONFIG_MAPPING, AutoConfig

    if config.get("model_type") not in CONFIG_MAPPING:
        return config
    try:
        return AutoConfig.for_model(**config).to_dict()
    except Exception as error:  # Of many kinds: each version checks in its own way.
        said = str(error).strip().splitlines()[0]
        raise ValueError(f"{where} is no {config['model_type']} that transformers knows: {said}") from error


def load_tokenizer(directory: pathlib.Path) -> Tokenizer:
    """The tokenizer of a directory: tokenizer.json, or what transformers makes of older files.

    Raises:
      FileNotFoundError: there is none. ValueError: it is damaged.
    """
    file = directory / "tokenizer.json"
    if file.exists():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # What tokenizers raises has no name of its own.
            raise ValueError(f"{file} is truncated or no tokenizer: {error}") from error
    else:
        tokenizer = _older_tokenizer(directory)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _older_tokenizer(directory: pathlib.Path) -> Tokenizer:
    """What transformers makes of vocab.json and merges.txt, or of a SentencePiece model."""
    from transformers import AutoTokenizer

    try:
        # A directory may name code of its own (auto_map), which would be asked about and run.
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        return tokenizer.backend_tokenizer
    except Exception as error:  # Of many kinds, also that a package is missing.
        mend = "expected one beside the weights"
        if list(directory.glob("*.model")):
            mend = "for a *.model file run pip install 'blip2_jax[sentencepiece]'"
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{directory / 'tokenizer.json'} is missing, and transformers makes no tokenizer of other files there "
            f"({said}); {mend}"
        ) from error


class Renamed:
    """Tensors by other names; those that have none are hidden.

    Attributes:
      where: for messages.
    """

    def __init__(self, whole: Tensors, names: Mapping[str, str], where: str = ""):
        """Show `whole` under the keys of `names`, whose values are its own names."""
        self.where = where or whole.where
        self._whole = whole
        self._names = dict(names)

    def names(self) -> list[str]:
        return list(self._names)

    def read(self, name: str) -> np.ndarray:
        return self._whole.read(self._names[name])


def without_prefix(whole: Tensors, prefix: str) -> Renamed:
    """The tensors whose names begin with a prefix, without it: a model inside a larger one."""
    names = {name.removeprefix(prefix): name for name in whole.names() if name.startswith(prefix)}
    return Renamed(whole, names, f"{whole.where} ({prefix}*)" if prefix else "")


def with_ties(whole: Tensors, ties: Mapping[str, str]) -> Renamed:
    """The tensors, and those that a file leaves out because they are the same as another: {left out: the other}."""
    own = {name: name for name in whole.names()}
    return Renamed(whole, {name: same for name, same in ties.items() if same in own} | own)


def part_of(whole: Tensors, anchor: str, prefixes: Sequence[str]) -> Renamed:
    """The part that begins with the first of `prefixes` behind which there is a tensor `anchor`.

    Files of a bare model ("decoder.x" where others have "model.decoder.x") lack the beginning of every name.

    Raises:
      ValueError: behind none of them.
    """
    known = set(whole.names())
    for prefix in prefixes:
        if prefix + anchor in known:
            return without_prefix(whole, prefix)
    beginning, _, rest = anchor.partition(".")
    if rest in known:
        return Renamed(whole, {f"{beginning}.{name}": name for name in known})
    tried = ", ".join(repr(prefix + anchor) for prefix in prefixes)
    raise ValueError(f"{whole.where}: not the model that was asked for, it has none of the tensors {tried}")
