"""Directories of Hugging Face models by name: here, in the hub's cache, or fetched from the hub."""

from __future__ import annotations

import pathlib
import re

from huggingface_hub import hf_hub_download, snapshot_download

# Weights in the formats that are read here, sizes and tokenizers; not the same weights again in other formats.
_WEIGHTS = ("*.safetensors*", "pytorch_model*")
_BESIDE = ("*.json", "*.model", "*.txt")


def is_name(text: str) -> bool:
    """Whether a text names a repository (ORG/NAME) and not a folder that is here."""
    here = pathlib.Path(text).expanduser().exists()
    return not here and re.fullmatch(r"\w[\w.-]*/[\w.-]+", text) is not None


def directory(name: str) -> pathlib.Path:
    """The folder that a text names; a repository's files are fetched unless they are in the cache.

    Raises:
      ConnectionError: a repository that is not in the cache cannot be fetched.
    """
    if not is_name(name):
        return pathlib.Path(name).expanduser()
    try:
        folder = pathlib.Path(snapshot_download(name, allow_patterns=[*_BESIDE, _WEIGHTS[0]]))
        if not list(folder.glob(_WEIGHTS[0])):
            snapshot_download(name, allow_patterns=[_WEIGHTS[1]])
        return folder
    except OSError as error:
        raise _unreachable(name, error) from error


def config_file(name: str, cached: bool) -> pathlib.Path | None:
    """config.json of a folder or a repository, without its weights; None if `cached` and it is not on this machine.

    Raises:
      ConnectionError: a repository that is not in the cache cannot be fetched.
    """
    if not is_name(name):
        return pathlib.Path(name).expanduser() / "config.json"
    try:
        return pathlib.Path(hf_hub_download(name, "config.json", local_files_only=cached))
    except OSError as error:
        if cached:
            return None
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: OSError) -> ConnectionError:
    return ConnectionError(
        f"hf:{name} is neither a directory here nor in the hub's cache, and could not be fetched "
        f"({str(error).strip().splitlines()[0]}). Where there is a network run `hf download {name}`, "
        "and name the folder that it prints: hf:DIR"
    )
