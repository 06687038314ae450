"""Runs that the launchers start on this machine: a tiny recipe, and the script that starts it."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys

from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent.parent
LAUNCH = ROOT / "launch"


def environment(**more: str) -> dict[str, str]:
    """That of this process with its python first, and without what makes it one of several."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "SLURM_"))}
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    return own | {"PATH": path, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | more


def start(*command: str | pathlib.Path, **more: str) -> subprocess.Popen:
    """A script of launch/, in a session of its own."""
    return subprocess.Popen(
        ["bash", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**more),
        start_new_session=True,
    )


def end(process: subprocess.Popen, timeout: float) -> tuple[int, str]:
    """Exit code and output of what `start` started; what is left of it after so many seconds is killed."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, output


def recipe(folder: pathlib.Path, file: pathlib.Path, **changes) -> pathlib.Path:
    """Stage 1 on tiny things as several processes can train it, on a mesh of two devices."""
    tiny.recipe("stage1", folder)  # Which makes the files.
    plain = {"data.feature_views": 0, "data.eval": "", "vision": f"hf:{folder / 'vit'}", "mesh": "data=2"}
    return tiny.recipe_file(tiny.recipe("stage1", folder, **plain | changes), file)
