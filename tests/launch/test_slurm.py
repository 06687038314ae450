"""launch/slurm.sbatch with srun and scontrol of this machine: who is started, and when the job is queued again."""

import pathlib
import re
import shlex
import sys
import time

import pytest

from blip2_jax.monitoring.metrics import read_metrics
from tests.launch import runs, slurm

BATCH = runs.LAUNCH / "slurm.sbatch"


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """Variables of a job of two tasks, and the commands."""
    return {
        "PATH": f"{slurm.install(tmp_path / 'commands')}:{runs.environment()['PATH']}",
        "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
        "SLURM_SUBMIT_DIR": str(runs.ROOT),
        "SLURM_JOB_ID": str(hash(str(tmp_path)) % 100_000),  # Of which jax makes the coordinator's port.
        "SLURM_NTASKS": "2",
    }


def requeued(tmp_path: pathlib.Path) -> list[str]:
    file = tmp_path / "scontrol.log"
    return file.read_text().splitlines() if file.exists() else []


def start(tmp_path: pathlib.Path, program: str, *arguments: str, **environment: str):
    """The job with a program in the place of main, in an environment (VENV) whose python runs nothing else."""
    (tmp_path / "program.py").write_text(
        f"import os, signal, sys, time\nnumber = int(os.environ['SLURM_PROCID'])\n{program}"
    )
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -u {tmp_path / "program.py"} "$@"\n')
    python.chmod(0o755)
    return runs.start(BATCH, *(arguments or ["--config=x"]), VENV=str(tmp_path / "venv"), **environment)


def run(*arguments, **environment: str) -> tuple[int, str]:
    return runs.end(start(*arguments, **environment), 60)


def test_every_task_is_main_with_the_arguments_of_the_job(tmp_path, cluster):
    code, output = run(
        tmp_path, "sys.stdout.write(f'{number} {sys.argv[1:]}\\n')", "--config=a b.py", "--workdir=w", **cluster
    )
    assert code == 0
    arguments = ["-m", "blip2_jax.main", "--config=a b.py", "--workdir=w"]
    assert sorted(output.splitlines()) == [f"{number} {arguments}" for number in (0, 1)]
    assert not requeued(tmp_path)


# The second number is how often the job was started again before, of twice at most.
@pytest.mark.parametrize(
    ("program", "before", "code", "again"),
    [
        ("sys.exit(75)", 0, 75, True),
        ("sys.exit(75)", 1, 75, True),
        ("sys.exit(75)", 2, 75, False),
        ("if number: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(300)", 0, 75, True),
        # The other task is killed by srun, whose own code speaks of that one.
        ("if number: sys.exit(1)\ntime.sleep(300)", 0, 1, False),
        ("if number: sys.exit(130)\ntime.sleep(300)", 0, 130, False),
    ],
)
def test_the_job_is_queued_again_if_the_run_can_go_on(tmp_path, cluster, program, before, code, again):
    found, output = run(tmp_path, program, REQUEUES="2", SLURM_RESTART_COUNT=str(before), **cluster)
    assert found == code, output
    assert requeued(tmp_path) == [f"requeue {cluster['SLURM_JOB_ID']}"] * again
    assert ("submit it anew" in output) == (before == 2)
    assert not [*runs.ROOT.glob("slurm-*.codes")]


@pytest.mark.parametrize(("own", "code", "again"), [(1, 1, False), (143, 75, True)])
def test_an_error_of_srun_itself_is_one_and_a_step_that_was_ended_goes_on(tmp_path, cluster, own, code, again):
    (tmp_path / "commands" / "srun").write_text(f"#!/bin/sh\nexit {own}\n")
    found, output = run(tmp_path, "", **cluster)
    assert found == code, output
    assert len(requeued(tmp_path)) == again


def test_the_warning_before_the_end_reaches_the_run_which_is_waited_for(tmp_path, cluster):
    program = (
        "def stop(signum, frame): time.sleep(1); print('saved', number); sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"open(f'{tmp_path}/ready-{{number}}', 'w')\n"
        "time.sleep(300)"
    )
    job = start(tmp_path, program, **cluster)
    while len([*tmp_path.glob("ready-*")]) < 2:
        time.sleep(0.1)
    job.terminate()  # The script alone, as --signal=B:TERM does.
    code, output = runs.end(job, 60)
    assert code == 75
    assert "saved" in output
    assert requeued(tmp_path) == [f"requeue {cluster['SLURM_JOB_ID']}"]


def test_what_cannot_work_is_refused(tmp_path, cluster):
    code, output = runs.end(runs.start(BATCH, **cluster), 30)
    assert (code, output.partition(":")[0]) == (2, "error")
    assert "nothing to train" in output
    code, output = runs.end(runs.start(BATCH, "--config=x", **cluster | {"SLURM_SUBMIT_DIR": str(tmp_path)}), 30)
    assert code == 2
    assert "is not the repository: submit the job there" in output


def test_its_options_are_those_that_it_is_written_for():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", BATCH.read_text(), re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"].startswith("B:TERM@")
    assert "requeue" in options
    assert options["open-mode"] == "append"


@pytest.mark.slow
def test_two_tasks_train_one_run(folder, tmp_path, cluster):
    recipe = runs.recipe(folder, tmp_path / "recipe.py", total_steps=4)
    venv = pathlib.Path(sys.executable).parent.parent
    job = runs.start(
        BATCH,
        *(f"--config={recipe}", f"--workdir={tmp_path / 'run'}"),
        **cluster | {"VENV": str(venv), "BLIP2_JAX_CACHE": str(folder / "cache")},
    )
    code, output = runs.end(job, 600)
    assert code == 0, output
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 4]
    assert "processes: this is number 0 of 2, with 1 of 2 devices" in output
    assert output.count("\nprocesses:") + output.startswith("processes:") == 1  # The second task tells nothing.
    assert not requeued(tmp_path)
