"""srun and scontrol for one machine: as much of them as launch/slurm.sbatch needs.

`python tests/launch/slurm.py srun OPTIONS COMMAND` starts SLURM_NTASKS tasks with the variables that Slurm gives them,
hands SIGTERM on to all processes of each, ends the others when one fails, and exits with the largest code.
`... scontrol ARGUMENTS` writes its arguments into the file SCONTROL_LOG.
"""

from __future__ import annotations

import os
import pathlib
import signal
import stat
import subprocess
import sys
import time


def install(folder: pathlib.Path) -> pathlib.Path:
    """A folder for PATH with both commands."""
    folder.mkdir()
    for name in ("srun", "scontrol"):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {pathlib.Path(__file__).absolute()} {name} "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return folder


def srun(arguments: list[str]) -> int:
    options = [word for word in arguments if word.startswith("--")]
    start = next(number for number, word in enumerate(arguments) if not word.startswith("--"))
    assert "--kill-on-bad-exit=1" in options[:start]
    count = int(os.environ["SLURM_NTASKS"])
    variables = {"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": str(count)}
    tasks = [
        subprocess.Popen(
            arguments[start:],
            env=os.environ | variables | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
            start_new_session=True,
        )
        for number in range(count)
    ]

    def send(number, _frame=None):
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, number)

    signal.signal(signal.SIGTERM, send)
    while any(task.poll() is None for task in tasks):
        if any(task.poll() for task in tasks):
            send(signal.SIGKILL)
        time.sleep(0.05)
    return max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks)


if __name__ == "__main__":
    if sys.argv[1] == "srun":
        sys.exit(srun(sys.argv[2:]))
    with open(os.environ["SCONTROL_LOG"], "a") as log:
        print(*sys.argv[2:], file=log)
