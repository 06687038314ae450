"""PyTorch files (.pth, .bin): LAVIS's checkpoints, and Hugging Face directories from before safetensors.

They are pickles. They are never unpickled otherwise than with weights_only=True, which runs no code of theirs, and are
mapped into memory, so that a tensor is read from disk when it is asked for.
"""

from __future__ import annotations

import pathlib
import pickle
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

# Where programs keep the tensors among other things.
_NESTED = ("model", "state_dict", "module")
# A mapped file keeps in memory all that was ever read of it, until it is mapped anew.
_REOPEN_BYTES = 2**26


class TorchFile:
    """The tensors of one or several PyTorch files, by name.

    Attributes:
      path: of the first file.
      where: of all, for messages.
      files: the files.
    """

    def __init__(self, *files: str | pathlib.Path):
        """Open the files.

        Raises:
          FileNotFoundError: a file is not there.
          ValueError: it is truncated, holds no tensors by name, or more than tensors.
        """
        self.files = [pathlib.Path(file) for file in files]
        self.path = self.files[0]
        self.where = ", ".join(map(str, self.files))
        self._open()

    def _open(self) -> None:
        self._read_bytes = 0
        self._tensors: dict[str, Any] = {}
        self._mapped = True
        for file in self.files:
            tensors, mapped = _open(file)
            self._tensors |= tensors
            self._mapped &= mapped

    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> np.ndarray:
        if self._mapped and self._read_bytes > _REOPEN_BYTES:
            self._open()
        tensor = self._tensors[name].detach()
        self._read_bytes += tensor.nbytes
        if str(tensor.dtype) == "torch.bfloat16":  # numpy knows it by another name only.
            return tensor.view(_torch().int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def _torch():
    try:
        import torch  # Needed for these files alone.
    except ImportError as error:
        raise ValueError("reading PyTorch files needs torch: pip install 'blip2_jax[torch]'") from error
    return torch


def _open(file: pathlib.Path) -> tuple[Mapping[str, Any], bool]:
    """The tensors of a file, and whether they are mapped."""
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist")
    torch, mapped = _torch(), True
    load = lambda **options: torch.load(file, map_location="cpu", weights_only=True, **options)
    try:
        try:
            content = load(mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            content, mapped = load(), False  # A file of torch 1.5 or older cannot be mapped.
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} holds more than tensors, or is no PyTorch file, and is not opened: unpickling it could run code "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file} is truncated or not a PyTorch file: {str(error).splitlines()[0]}") from error
    for name in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    found = content.items() if isinstance(content, Mapping) else ()
    tensors = {name: value for name, value in found if isinstance(value, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{file} holds no tensors by name, neither itself nor under {', '.join(_NESTED)}")
    return tensors, mapped
