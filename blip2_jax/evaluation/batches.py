"""Many rows through a compiled function that takes batches of one size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from blip2_jax.monitoring.progress import progress


def in_batches(function: Callable[..., np.ndarray], arrays: Sequence[np.ndarray], size: int, label: str) -> np.ndarray:
    """`function` of all rows of `arrays`.

    Args:
      function: arrays [size, ...] to an array [size, ...].
      arrays: [N, ...] each. The last batch is filled up with zeros, and what comes of them is dropped.
      size: of a batch.
      label: of the progress bar.

    Returns:
      [N, ...].
    """
    results = []
    for start in progress(range(0, len(arrays[0]), size), desc=label, unit="batch", leave=False):
        parts = [array[start : start + size] for array in arrays]
        real = len(parts[0])
        filled = [np.pad(part, ((0, size - real), *[(0, 0)] * (part.ndim - 1))) for part in parts]
        results.append(np.asarray(function(*filled))[:real])
    return np.concatenate(results)
