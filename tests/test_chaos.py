"""Killed at any moment and started again, a run ends as if nothing had happened."""

from __future__ import annotations

import os
import pathlib
import runpy
import signal
import subprocess
import sys
import time

import ml_collections
import numpy as np
import pytest

from blip2_jax import trainer
from blip2_jax.monitoring.metrics import read_metrics
from tests import tiny
from tests.runs import same_parameters, same_rows


def survive(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, kills: int, longest: float, devices: int
) -> list[str]:
    """Train in `workdir`, killed so many times by SIGKILL; every third time, while a checkpoint is being written.

    Args:
      config: of the run.
      workdir: its folder.
      kills: how many.
      longest: seconds, from when a process has its first step behind it, until it is killed.
      devices: fake ones.

    Returns:
      what was going on at each kill.
    """
    file = tiny.recipe_file(config, workdir.parent / "recipe.py")
    command = [sys.executable, "-m", "blip2_jax.main", f"--config={file}", f"--workdir={workdir}"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    rng, moments = np.random.default_rng(0), []
    log = workdir.parent / "log"
    while True:
        with log.open("w") as stream:
            process = subprocess.Popen(command, env=environment, stderr=stream)
        if len(moments) < kills:
            moment = _wait_for_a_moment(process, workdir, len(moments) % 3 == 2, longest * rng.random())
            process.kill()
            if process.wait() == -signal.SIGKILL:
                moments.append(moment)
        if process.wait() == 0:
            return moments
        assert process.returncode == -signal.SIGKILL, log.read_text()


def _wait_for_a_moment(process: subprocess.Popen, workdir: pathlib.Path, writing: bool, seconds: float) -> str:
    """Until it is time to kill: a while after a process has begun or made a step, or in the middle of a checkpoint."""
    started, known = time.monotonic(), _newest(workdir)
    deadline = None
    while process.poll() is None:
        if writing and any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp")) and _newest(workdir) > known:
            return f"writing a checkpoint, after step {_newest(workdir)}"
        if not writing and deadline is None and seconds < 1:  # Some die before they have done anything.
            deadline = started + 8 * seconds
        if not writing and deadline is None and _newest(workdir) > known:
            deadline = time.monotonic() + seconds
        if deadline and time.monotonic() > deadline:
            return f"{time.monotonic() - started:.1f} s after its start, after step {_newest(workdir)}"
        time.sleep(0.002)
    return "ended by itself"


def _newest(workdir: pathlib.Path) -> int:
    """The last step with metrics."""
    rows = read_metrics(workdir / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def test_a_few_kills(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP2_JAX_CACHE", str(folder / "cache"))
    changes = {"total_steps": 12, "log_every": 1, "checkpoint_every": 3, "data.eval": ""}
    config = tiny.recipe("stage1", folder, **changes)
    trainer.train(config, tmp_path / "undisturbed")
    assert len(survive(config, tmp_path / "killed", kills=3, longest=1.0, devices=8)) == 3
    same_parameters(tmp_path / "undisturbed", tmp_path / "killed")
    same_rows(tmp_path / "undisturbed", tmp_path / "killed")


@pytest.mark.chaos
def test_thirty_kills_of_nano(tmp_path):
    """The real models and pictures, with a checkpoint every second step so that kills meet many of them."""
    path = pathlib.Path(__file__).parent.parent / "configs" / "stage1.py"
    config = runpy.run_path(str(path))["get_config"]()
    changes = {"total_steps": 120, "batch_size": 32, "log_every": 1, "checkpoint_every": 2, "eval_every": 60}
    config.update_from_flattened_dict(changes | {"mesh": "data=-1", "data.eval": "nano:val_drawing"})
    survive(config, tmp_path / "undisturbed", kills=0, longest=0.0, devices=1)
    moments = survive(config, tmp_path / "killed", kills=30, longest=8.0, devices=1)
    print("\n".join(moments))
    assert len(moments) == 30
    assert sum("writing" in moment for moment in moments) >= 8
    same_parameters(tmp_path / "undisturbed", tmp_path / "killed")
    same_rows(tmp_path / "undisturbed", tmp_path / "killed")
