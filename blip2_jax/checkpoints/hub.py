"""Models of the Hugging Face hub by name: from its cache on this machine, or fetched where there is a network."""

from __future__ import annotations

import pathlib
import re

from huggingface_hub import snapshot_download

# Weights in the formats that are read here, sizes and tokenizers; not the same weights again in other formats.
_WEIGHTS = ("*.safetensors*", "pytorch_model*")
_BESIDE = ("*.json", "*.model", "*.txt")


def is_name(text: str) -> bool:
    """Whether a text can be the name of a repository, as ORG/NAME."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None and not text.startswith(".")


def fetch(name: str) -> pathlib.Path:
    """The directory of a repository's files.

    Raises:
      ConnectionError: it is not in the cache and cannot be fetched.
    """
    try:
        folder = pathlib.Path(snapshot_download(name, allow_patterns=[*_BESIDE, _WEIGHTS[0]]))
        if not list(folder.glob(_WEIGHTS[0])):
            snapshot_download(name, allow_patterns=[_WEIGHTS[1]])
        return folder
    except OSError as error:
        raise ConnectionError(
            f"hf:{name} is neither a directory here nor in the hub's cache, and could not be fetched "
            f"({str(error).strip().splitlines()[0]}). Where there is a network run `hf download {name}`, "
            "and name the folder that it prints: hf:DIR"
        ) from error
