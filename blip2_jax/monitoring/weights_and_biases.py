"""Weights & Biases, where `config.wandb.project` names a project: the rows of metrics.jsonl, and the configuration.

The package finds its key by itself (`wandb login`, WANDB_API_KEY); nothing here asks for it, shows it or keeps it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import secrets
import sys
from collections.abc import Mapping
from typing import Any

import ml_collections

from blip2_jax import files
from blip2_jax.monitoring.metrics import Row
from blip2_jax.monitoring.progress import tell

MODES = ("", "online", "offline")


def block() -> ml_collections.ConfigDict:
    """The block of a recipe: off.

    `project` is where runs go, "" for nowhere; `name` the run's, "" for one that is made up; `mode` "online" or
    "offline", "" for what WANDB_MODE says.
    """
    return ml_collections.ConfigDict({"project": "", "name": "", "mode": ""})


def check(config: ml_collections.ConfigDict) -> None:
    """Raise ValueError if the block `config.wandb` cannot be fulfilled."""
    if config.mode not in MODES:
        raise ValueError(f"wandb.mode = {config.mode!r}: expected online, offline, or '' for what WANDB_MODE says")
    if not config.project and (config.name or config.mode):
        raise ValueError("wandb.name and wandb.mode say nothing without wandb.project: name the project")
    if config.project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"wandb.project = {config.project!r}, but the package wandb is not there: pip install 'blip2_jax[wandb]', "
            "or set wandb.project=''"
        )


class WeightsAndBiases:
    """The run of a workdir there, always the same one; WORKDIR/wandb.json says which, and how far it has been told."""

    def __init__(self, workdir: pathlib.Path, config: ml_collections.ConfigDict, recipe: Mapping[str, Any]):
        """Begin or go on.

        Args:
          workdir: of the run.
          config: the block `config.wandb`.
          recipe: the resolved configuration, to be shown beside the run.

        Raises:
          ValueError: it cannot be begun there.
        """
        import wandb  # An extra, and slow to import.

        self._file = workdir / "wandb.json"
        known = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._state = {"id": known.get("id") or secrets.token_hex(4), "step": known.get("step", 0)}
        files.write_json(self._file, self._state)
        try:
            self._run = wandb.init(
                project=config.project,
                name=config.name or None,
                mode=config.mode or None,
                id=self._state["id"],
                resume="allow",
                dir=str(workdir),
                config=dict(recipe),
                settings=wandb.Settings(console="off"),  # stderr is ours.
            )
        except Exception as error:  # It has many kinds.
            raise ValueError(
                f"Weights & Biases refuses the project {config.project!r}: {_without_key(error)}; run `wandb login`, "
                "or set wandb.mode=offline or wandb.project=''"
            ) from None

    def write(self, row: Row) -> None:
        """Tell of a row, unless it was told: steps done again after a resumption have the same numbers."""
        step = row["step"]
        if self._run is None or step <= self._state["step"]:
            return
        try:
            self._run.log({name: value for name, value in row.items() if name != "step"}, step=step)
        except Exception as error:  # A service that is down is no reason to stop.
            tell(f"Weights & Biases is told no more ({_without_key(error)}); metrics.jsonl has everything")
            self._run = None
            return
        self._state["step"] = step
        files.write_json(self._file, self._state)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(sys.exception() is not None))


def _without_key(error: Exception) -> str:
    key = os.environ.get("WANDB_API_KEY")
    return str(error).replace(key, "***") if key else str(error)
