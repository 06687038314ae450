"""Runs and their workdirs, compared."""

from __future__ import annotations

import pathlib

import chex

from blip2_jax.checkpoints import store
from blip2_jax.monitoring.metrics import read_metrics


def same_rows(left: pathlib.Path, right: pathlib.Path) -> None:
    """All metrics but those under timing/ are bit-identical, and no step is there twice."""
    rows = [
        [{name: value for name, value in row.items() if not name.startswith("timing/")} for row in read_metrics(file)]
        for file in (left / "metrics.jsonl", right / "metrics.jsonl")
    ]
    assert rows[0] == rows[1]
    steps = [row["step"] for row in rows[0]]
    assert steps == sorted(set(steps))


def same_parameters(left: pathlib.Path, right: pathlib.Path) -> None:
    """The trainable trees of the newest checkpoints are bit-identical."""
    trees = [store.load_trainable(store.find_checkpoint(workdir)) for workdir in (left, right)]
    chex.assert_trees_all_equal(*trees)
