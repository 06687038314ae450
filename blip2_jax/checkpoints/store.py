"""Our own checkpoints, with Orbax: what is trained, the optimizer, where the data stand, and what it all rests on.

WORKDIR/checkpoints/STEP/
  trainable/  optimizer/  run/     arrays
  data.json                        the sources with their hashes, and how many records could not be used
  frozen.json                      source, SHA-256 and dtype of each frozen part
  config.json                      the resolved configuration
  metrics.jsonl                    the rows that were logged until then
  manifest.json                    size and SHA-256 of every file
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from blip2_jax import compat, params
from blip2_jax.checkpoints import manifest
from blip2_jax.data import filters
from blip2_jax.models import lora
from blip2_jax.monitoring import alarms, weights_and_biases
from blip2_jax.parallel import processes


@dataclasses.dataclass
class TrainState:
    """All that a training step changes.

    Attributes:
      step: int32[], steps done.
      rng: key of the run; each step folds its number in.
      trainable: the parameters.
      optimizer: state of the optimizer.
      skipped: int32[2], steps that were not applied since something was not finite: in all, and the last ones in a row.
    """

    step: jax.Array
    rng: jax.Array
    trainable: params.Tree
    optimizer: Any
    skipped: jax.Array = dataclasses.field(default_factory=lambda: jnp.zeros(2, jnp.int32))


jax.tree_util.register_dataclass(TrainState, ["step", "rng", "trainable", "optimizer", "skipped"], [])


# Under jit, since the key may lie on devices of several processes.
_words = jax.jit(jax.random.key_data)
_key = jax.jit(jax.random.wrap_key_data, static_argnames="impl")


class _Facts:
    """Small text files beside the arrays of a checkpoint, committed together with them."""

    def __init__(self, **contents: Any):
        """What to write by name: NAME.jsonl, line by line, where it is a list, NAME.json otherwise."""
        self._files = {}
        for name, content in contents.items():
            if isinstance(content, list):
                self._files[f"{name}.jsonl"] = "".join(json.dumps(row) + "\n" for row in content)
            else:
                self._files[f"{name}.json"] = json.dumps(content, indent=2, sort_keys=True)

    async def save(self, directory):
        async def write():
            path = await directory.await_creation()
            if jax.process_index():
                return
            for name, text in self._files.items():
                (path.parent / name).write_text(text)

        return write()

    async def load(self, directory):
        async def read():
            return None

        return read()


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which checkpoints stay; the others go when a new one is written.

    Attributes:
      newest: so many.
      every: those of steps that are multiples of it; 0: none.
      best: the one with the best value of this metric of an evaluation, the highest, or with a "-" before its name the
        lowest; "": none.
    """

    newest: int = 2
    every: int = 0
    best: str = ""

    def policy(self) -> ocp.training.preservation_policies.PreservationPolicy:
        policies = ocp.training.preservation_policies
        parts = [policies.LatestN(self.newest)]
        if self.every:
            parts.append(policies.EveryNSteps(self.every))
        if self.best:
            parts.append(policies.BestN(get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False))
        return policies.AnyPreservationPolicy(parts)

    def _score(self, metrics: dict[str, float]) -> float:
        # An older one may have been judged by another metric.
        score = metrics.get(self.best.removeprefix("-"), math.nan)
        return -math.inf if math.isnan(score) else -score if self.best.startswith("-") else score

    def metrics(self, evaluated: Mapping[str, float]) -> dict[str, float] | None:
        """Of what was evaluated, that which `best` needs.

        Raises:
          ValueError: it is not there.
        """
        name = self.best.removeprefix("-")
        if not evaluated or not name:
            return None
        if name not in evaluated:
            raise ValueError(f"keep_best: no evaluation measures {name!r}; measured are {', '.join(sorted(evaluated))}")
        return {name: evaluated[name]}


class Store:
    """The checkpoints of one workdir, which are written while training goes on.

    All processes of a run call together.
    """

    def __init__(self, directory: pathlib.Path, keep: Keep | None = None):
        """Open the checkpoints under `directory`, after those that are damaged were set aside; `keep`: Keep()."""
        self._directory, self._keep = directory.absolute(), keep or Keep()
        processes.first(lambda: manifest.set_damaged_aside(self._directory))
        self._open()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._writing: concurrent.futures.Future | None = None

    def _open(self) -> None:
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=self._keep.policy(),
            cleanup_tmp_directories=True,
        )

    @property
    def newest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def facts(self, name: str) -> Any:
        """What `save` was given under a name, of the newest checkpoint; None if there was no such thing yet."""
        folder = self._directory / str(self.newest)
        if (folder / f"{name}.jsonl").exists():
            return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        return json.loads((folder / f"{name}.json").read_text()) if (folder / f"{name}.json").exists() else None

    def save(self, state: TrainState, evaluated: Mapping[str, float] | None = None, **facts: Any) -> None:
        """Begin to write a checkpoint of this step; it appears whole or not at all. `settle` says how it went.

        The state may be given to the next step at once.

        Args:
          state: after the step.
          evaluated: metrics of an evaluation at this step, by which the best checkpoint is kept.
          facts: JSON by name: config, data, frozen, and the rows of metrics so far.

        Raises:
          ValueError: `evaluated` lacks what the best checkpoint is kept by.
        """
        step, metrics = int(state.step), self._keep.metrics(evaluated or {})
        arrays = {"step": state.step, "rng": _words(state.rng), "skipped": state.skipped}
        parts = {"trainable": state.trainable, "optimizer": state.optimizer, "run": arrays, "facts": _Facts(**facts)}
        try:
            there = any(known.step == step for known in self._checkpointer.checkpoints)  # Only the manifest failed.
            response = (
                None
                if there
                else self._checkpointer.save_checkpointables_async(step, parts, force=True, metrics=metrics)
            )
        except Exception as error:  # Orbax wraps the system's errors in others.
            self._writing = concurrent.futures.Future()
            self._writing.set_exception(error)
        else:
            self._writing = self._worker.submit(self._finish, step, response)

    def _finish(self, step: int, response: Any) -> None:
        if response:
            response.result()
        if jax.process_index() == 0:
            manifest.write(self._directory / str(step))

    def written(self) -> bool:
        """Whether a checkpoint was begun, and no process writes at it any more."""
        return bool(self._writing) and not processes.add_up(np.array([not self._writing.done()]))[0]

    def settle(self) -> Exception | None:
        """Wait for the checkpoint that is being written, if any; what went wrong, which may be tried again."""
        if not self._writing:
            return None
        error, self._writing = self._writing.exception(), None
        if not processes.add_up(np.array([error is not None]))[0]:
            return None
        with contextlib.suppress(Exception):  # It raises the same once more.
            self._checkpointer.close()
        self._open()  # Which removes what is half-written.
        return error or OSError("another process could not write its part")

    def restore(self, like: TrainState) -> TrainState:
        """The newest checkpoint, with the structure and shardings of `like`."""
        run = {"step": like.step, "rng": _words(like.rng), "skipped": like.skipped}
        saved = ocp.metadata(self._directory / str(self.newest), checkpointable_name="run").metadata
        # The first checkpoints did not count skipped steps: a non-finite loss ended the run.
        run = {name: array for name, array in run.items() if name in saved}
        arrays = {"trainable": like.trainable, "optimizer": like.optimizer, "run": run}
        loaded = self._checkpointer.load_checkpointables(self.newest, jax.tree.map(ocp_abstract, arrays))
        run = loaded["run"]
        rng = _key(run["rng"], impl=jax.random.key_impl(like.rng))
        return TrainState(run["step"], rng, loaded["trainable"], loaded["optimizer"], run.get("skipped", like.skipped))

    def close(self) -> None:
        self._worker.shutdown()
        self._checkpointer.close()


def save_alone(directory: pathlib.Path, trainable: params.Tree, config: dict, frozen: dict) -> None:
    """Write a checkpoint to start from, without optimizer and data; it appears whole or not at all."""
    parts = {"trainable": jax.tree.map(jnp.asarray, trainable), "facts": _Facts(config=config, frozen=frozen)}
    ocp.save_checkpointables(directory.absolute(), parts)
    manifest.write(directory)


def ocp_abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """What Orbax restores an array into: its shape, dtype and sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def find_checkpoint(path: str | pathlib.Path) -> pathlib.Path:
    """The checkpoint that a user means: a workdir's newest that is whole, or a checkpoint itself.

    Raises:
      FileNotFoundError: there is none.
    """
    path = pathlib.Path(path).expanduser().absolute()
    if (path / "frozen.json").exists():
        return path
    for step in manifest.steps(path / "checkpoints"):
        checkpoint = path / "checkpoints" / str(step)
        found = manifest.damage(checkpoint)
        if not found:
            return checkpoint
        print(f"{checkpoint} is damaged: {found}; looking for the one before", file=sys.stderr)
    raise FileNotFoundError(
        f"{path} holds no checkpoint: expected a workdir with checkpoints/STEP/frozen.json, or such a STEP"
    )


# Settings that came later than the first checkpoints, and what these did before there was a choice; by task.
_LATER_IN_BOTH = {
    "data/feature_dtype": "float16",
    "data/features": "",
    "data/max_rejected": 0.1,
    **params.flatten({"data": {"filters": filters.block().to_dict()}}),
    "data/workers": 0,
    "model/ln_vision_epsilon": 1e-5,
    "optimizer/steps_per_epoch": 0,
    "optimizer/warmup_rate": 0.0,
    "keep_best": "",
    "keep_every": 0,
    "profile/steps": "",
    **params.flatten({"lora": lora.block().to_dict()}),
    **params.flatten({"wandb": weights_and_biases.block().to_dict(), "alarms": alarms.block().to_dict()}),
    "max_skipped_in_a_row": 20,
    "pieces": 1,
    "shard_trainable": True,
    "watchdog_minutes": 30.0,
    **params.flatten({"compat": compat.block().to_dict()}),
}
_LATER = {
    "stage1": _LATER_IN_BOTH | {"objective/block": 512, "objective/exchange": "ring", "evaluation/templates": ""},
    "stage2": _LATER_IN_BOTH
    | {"data/bos": "", "data/split_captions": False, "instruct": False, "llm_activation": "", "llm_remat": False},
}


def read_config(folder: pathlib.Path) -> dict:
    """The configuration in a workdir or a checkpoint, with the settings that there were not yet when it was written."""
    config = json.loads((folder / "config.json").read_text())
    return params.unflatten(_LATER.get(config["task"], {}) | params.flatten(config))


def read_facts(checkpoint: pathlib.Path) -> tuple[dict, dict]:
    """The configuration and the frozen parts of a checkpoint."""
    return read_config(checkpoint), json.loads((checkpoint / "frozen.json").read_text())


def load_trainable(checkpoint: pathlib.Path) -> params.Tree:
    """The trainable tree of a checkpoint, on the first device."""
    saved = ocp.metadata(checkpoint, checkpointable_name="trainable").metadata
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), saved)
    return ocp.load_checkpointables(checkpoint, {"trainable": abstract})["trainable"]
