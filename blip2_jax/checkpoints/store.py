"""Our own checkpoints, with Orbax: what is trained, the optimizer, where the data stand, and what it all rests on.

WORKDIR/checkpoints/STEP/
  trainable/  optimizer/  run/     arrays
  data.json                        the sources with their hashes, and how many records could not be used
  frozen.json                      source, SHA-256 and dtype of each frozen part
  config.json                      the resolved configuration
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp

from blip2_jax import compat, params
from blip2_jax.data import filters


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
    """JSON files beside the arrays of a checkpoint, committed together with them."""

    def __init__(self, **files: dict):
        self._files = files

    async def save(self, directory):
        async def write():
            path = await directory.await_creation()
            if jax.process_index():
                return
            for name, content in self._files.items():
                (path.parent / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True))

        return write()

    async def load(self, directory):
        async def read():
            return None

        return read()


class Store:
    """The checkpoints of one workdir."""

    def __init__(self, directory: pathlib.Path, keep: int = 2):
        """Open the checkpoints under `directory`, of which the newest `keep` stay."""
        self._directory = directory.absolute()
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def newest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def data_facts(self) -> dict[str, Any]:
        """What `save` was given about the data; nothing if the checkpoint is older than such facts."""
        file = self._directory / str(self.newest) / "data.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def save(self, state: TrainState, data: dict, config: dict, frozen: dict) -> None:
        """Write a checkpoint of this step; it appears whole or not at all."""
        self._checkpointer.save_checkpointables(
            int(state.step),
            {
                "trainable": state.trainable,
                "optimizer": state.optimizer,
                "run": {"step": state.step, "rng": _words(state.rng), "skipped": state.skipped},
                "facts": _Facts(config=config, data=data, frozen=frozen),
            },
            force=True,
        )

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
        self._checkpointer.close()


def save_alone(directory: pathlib.Path, trainable: params.Tree, config: dict, frozen: dict) -> None:
    """Write a checkpoint to start from, without optimizer and data; it appears whole or not at all."""
    parts = {"trainable": jax.tree.map(jnp.asarray, trainable), "facts": _Facts(config=config, frozen=frozen)}
    ocp.save_checkpointables(directory.absolute(), parts)


def ocp_abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    """What Orbax restores an array into: its shape, dtype and sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def find_checkpoint(path: str | pathlib.Path) -> pathlib.Path:
    """The checkpoint that a user means: a workdir's newest, or a checkpoint itself.

    Raises:
      FileNotFoundError: there is none.
    """
    path = pathlib.Path(path).expanduser().absolute()
    if (path / "frozen.json").exists():
        return path
    folder = path / "checkpoints"
    steps = [step for step in folder.glob("*") if step.name.isdigit() and (step / "frozen.json").exists()]
    if not steps:
        raise FileNotFoundError(
            f"{path} holds no checkpoint: expected a workdir with checkpoints/STEP/frozen.json, or such a STEP"
        )
    return max(steps, key=lambda step: int(step.name))


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
    "max_skipped_in_a_row": 20,
    "pieces": 1,
    "shard_trainable": True,
    **params.flatten({"compat": compat.block().to_dict()}),
}
_LATER = {
    "stage1": _LATER_IN_BOTH | {"objective/block": 512, "objective/exchange": "ring"},
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
