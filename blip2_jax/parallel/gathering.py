"""What processes find, each for itself, brought together in all of them, which have to call together."""

from __future__ import annotations

import contextlib
import pathlib
import secrets
from collections.abc import Iterator
from typing import Any

import jax
import msgpack
import numpy as np
from jax.experimental import multihost_utils


def whole(tree: Any) -> Any:
    """The arrays of a tree, wherever their parts lie, as arrays of numpy in every process."""

    def fetch(array: jax.Array) -> np.ndarray:
        here = array.is_fully_addressable
        return np.asarray(array if here else multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(fetch, tree)


def of_all_processes(value: Any) -> list[Any]:
    """What each process gives, in their order; of dictionaries, lists, strings, numbers and None."""
    if jax.process_count() == 1:
        return [value]
    packed = np.frombuffer(msgpack.packb(value), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(len(packed)))).reshape(-1)
    filled = np.pad(packed, (0, int(lengths.max()) - len(packed)))
    rows = np.asarray(multihost_utils.process_allgather(filled))
    unpack = lambda row, length: msgpack.unpackb(row[:length].tobytes(), strict_map_key=False)
    return [unpack(row, length) for row, length in zip(rows, lengths, strict=True)]


def sharers(folder: pathlib.Path) -> list[int]:
    """The processes that see the same folder as this one, in order, this one among them; it is made if need be."""
    if jax.process_count() == 1:
        return [0]
    run, here = of_all_processes(secrets.token_hex(8))[0], jax.process_index()
    tokens = [folder / f".seen-{run}-{number}" for number in range(jax.process_count())]
    folder.mkdir(parents=True, exist_ok=True)
    tokens[here].touch()
    of_all_processes(None)  # Before anyone looks, all have written.
    seen = of_all_processes([number for number, token in enumerate(tokens) if token.exists()])
    tokens[here].unlink()
    return [number for number, others in enumerate(seen) if others == seen[here]]


@contextlib.contextmanager
def together(label: str) -> Iterator[None]:
    """What every process does by itself: at the end each waits for all, and if one has failed, all do.

    Raises:
      OSError: another process has failed, of which `label` says what it was doing.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    reasons = of_all_processes(failed and f"{type(failed).__name__}: {failed}")
    if failed:
        raise failed
    for number, reason in enumerate(reasons):
        if reason:
            raise OSError(f"{label}: process {number} of {len(reasons)} failed: {reason}")
