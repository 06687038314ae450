"""The batch that a run ended at, kept so that someone can look at it."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from blip2_jax import files


def write(workdir: pathlib.Path, step: int, batch: Mapping[str, Any], metrics: Mapping[str, Any]) -> pathlib.Path:
    """WORKDIR/nonfinite/STEP-PROCESS.npz with the rows of a batch that this process has, and what they led to.

    Args:
      workdir: of the run.
      step: whose loss or gradient was not finite.
      batch: arrays [B, ...] over the mesh.
      metrics: of the step; `metrics` in the file, as JSON.

    Returns:
      the file; numpy.load reads it, without pickle.
    """
    file = workdir / "nonfinite" / f"{step}-{jax.process_index()}.npz"
    with files.replacing(file) as partial, partial.open("wb") as stream:
        # Some dtypes, such as bfloat16, are none that a file of NumPy knows.
        known = lambda rows: rows if rows.dtype.isbuiltin == 1 else rows.astype(np.float32)
        arrays = {name: known(_own_rows(array)) for name, array in batch.items()}
        np.savez(stream, metrics=json.dumps(dict(metrics)), **arrays)
    return file


def _own_rows(array: Any) -> np.ndarray:
    """[b, ...]: each row that this process has, once, in order."""
    if not isinstance(array, jax.Array):
        return np.asarray(array)
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
