"""launch/local.sh: what it says and does when processes of a run end in all the ways they can."""

import os
import pathlib
import re
import signal
import time

import numpy as np
import pytest

from blip2_jax.monitoring.metrics import read_metrics
from tests.launch import runs

LOCAL = runs.LAUNCH / "local.sh"


def start(tmp_path: pathlib.Path, count: int, program: str, *options: str, **environment: str):
    """The launcher with a program of Python in the place of main."""
    file = tmp_path / "program.py"
    file.write_text("import os, signal, sys, time\nnumber = int(os.environ.get('JAX_PROCESS_ID', 0))\n" + program)
    return runs.start(LOCAL, str(count), *options, "--command", f"python -u {file}", **environment)


def run(*arguments, **environment: str) -> tuple[int, list[str]]:
    """Exit code and lines."""
    code, output = runs.end(start(*arguments, **environment), 60)
    return code, output.splitlines()


def test_every_process_knows_who_it_is_and_its_lines_say_whose_they_are(tmp_path):
    program = (
        "names = ('JAX_NUM_PROCESSES', 'JAX_COORDINATOR_ADDRESS', 'JAX_LOCAL_DEVICE_IDS')\n"
        "print(number, sys.argv[1:], *map(os.environ.get, names))\n"
        "print('an error', file=sys.stderr)"
    )
    code, lines = run(tmp_path, 2, program, "--config=a b.py", "--x=*")
    assert code == 0
    assert sorted(line for line in lines if "error" in line) == ["[0] an error", "[1] an error"]
    told = sorted(line for line in lines if "error" not in line)
    address = re.search(r"127\.0\.0\.1:\d+", told[0]).group()
    assert told == [f"[{number}] {number} ['--config=a b.py', '--x=*'] 2 {address} None" for number in (0, 1)]


def test_one_process_is_alone(tmp_path):
    code, lines = run(tmp_path, 1, "print(os.environ.get('JAX_COORDINATOR_ADDRESS'), end='')")
    assert (code, lines) == (0, ["[0] None"])


def test_a_killed_process_is_named_and_the_others_end(tmp_path):
    program = "if number == 1: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(300)"
    began = time.monotonic()
    code, lines = run(tmp_path, 2, program, GRACE="1")
    assert code == 75
    assert lines == [
        "process 1 was killed by SIGKILL",
        "process 0 has not ended by itself in 1 s and is killed",
        "process 0 was killed by SIGKILL",
    ]
    assert time.monotonic() - began < 30


def test_the_code_is_that_of_the_first_that_failed(tmp_path):
    program = "time.sleep(2 * (1 - number))\nsys.exit(3 if number else 4)"
    code, lines = run(tmp_path, 2, program, "--restarts", "2")
    assert code == 3
    assert lines == ["process 1 failed with exit code 3", "process 0 failed with exit code 4"]


@pytest.mark.parametrize(("restarts", "code"), [(2, 0), (1, 75)])
def test_what_can_go_on_is_started_again_so_often(tmp_path, restarts, code):
    program = (
        f"number_of_start = len(open({str(tmp_path / 'starts')!r}, 'a+').write('x') and"
        f" open({str(tmp_path / 'starts')!r}).read())\n"
        "print('start', number_of_start)\n"
        "if number_of_start == 1: sys.exit(75)\n"
        "if number_of_start == 2: os.kill(os.getpid(), signal.SIGABRT)"
    )
    found, lines = run(tmp_path, 1, program, "--restarts", str(restarts))
    assert found == code
    said = [line for line in lines if not line.startswith("[0]")]
    assert said == [
        "process 0 stopped, and can go on (exit code 75)",
        f"starting again (1 of {restarts})",
        "process 0 was killed by SIGABRT",
        *["starting again (2 of 2)"] * (restarts == 2),
    ]
    assert sum(line.startswith("[0] start") for line in lines) == restarts + 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_reach_every_process_once_and_nothing_starts_again(tmp_path, number, code):
    program = (
        f"def stop(signum, frame): print('told', signum); time.sleep(0.5); sys.exit({code})\n"
        f"signal.signal({int(number)}, stop)\n"
        f"open(f'{tmp_path}/ready-{{number}}', 'w')\n"
        "time.sleep(300)"
    )
    launcher = start(tmp_path, 2, program, "--restarts", "5")
    while len([*tmp_path.glob("ready-*")]) < 2:
        time.sleep(0.1)
    os.killpg(launcher.pid, number)  # As a terminal does with Ctrl-C.
    found, output = runs.end(launcher, 60)
    assert found == code
    assert sorted(re.findall(r"\[\d\] told \d+", output)) == [f"[{index}] told {int(number)}" for index in (0, 1)]
    assert "starting again" not in output


def test_gpus_are_shared_out(tmp_path):
    gpus = "".join(f"GPU {index}: NVIDIA H100\\n" for index in range(4))
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{gpus}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{runs.environment()['PATH']}"
    program = "print(os.environ.get('JAX_LOCAL_DEVICE_IDS'))"
    code, lines = run(tmp_path, 2, program, PATH=path, JAX_PLATFORMS="")
    assert (code, sorted(lines)) == (0, ["[0] 0,1", "[1] 2,3"])
    code, lines = run(tmp_path, 3, program, PATH=path, JAX_PLATFORMS="")
    assert (code, lines) == (2, ["error: 3 processes cannot share 4 GPUs evenly"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "the number of processes is '', expected one above 0"),
        (("0",), "the number of processes is '0'"),
        (("2", "--restarts", "often"), "--restarts is 'often', expected a number"),
        (("2", "--command"), "--command has no value behind it"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, says):
    code, output = runs.end(runs.start(LOCAL, *arguments), 30)
    assert code == 2
    assert output.startswith(f"error: {says}")


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """The metrics of a run of one process and four devices, of twenty steps, which the others are held against."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "w"
    code, output = runs.end(train(folder, workdir, 1), 900)
    assert code == 0, output
    return read_metrics(workdir / "metrics.jsonl")


def train(folder, workdir, count):
    """local.sh with so many processes of together four devices."""
    changes = {"total_steps": 20, "checkpoint_every": 2, "log_every": 1, "mesh": "data=4"}
    recipe = runs.recipe(folder, workdir.parent / "recipe.py", **changes)
    own = {"BLIP2_JAX_CACHE": str(folder / "cache"), "JAX_NUM_CPU_DEVICES": str(4 // count)}
    return runs.start(LOCAL, str(count), f"--config={recipe}", f"--workdir={workdir}", **own)


def after_some_steps(launcher, workdir):
    metrics = workdir / "metrics.jsonl"
    while launcher.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 5):
        time.sleep(0.1)
    if launcher.poll() is not None:
        pytest.fail(runs.end(launcher, 30)[1])


def same_but_for_rounding(workdir, expected):
    """All steps are there once; the number of processes changes only the order of sums."""
    found = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in found] == [*range(1, 21)]
    for one, other in zip(expected, found, strict=True):
        for name in one:
            if not name.startswith("timing/"):
                np.testing.assert_allclose(other[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "killed", "afterwards"), [(2, 1, 1), (4, 0, 2)])
def test_a_run_that_lost_a_process_goes_on_with_fewer(folder, tmp_path, undisturbed, count, killed, afterwards):
    """kill -9 of one: all end within a minute, and fewer processes with all devices end as if nothing had been."""
    workdir = tmp_path / "w"
    launcher = train(folder, workdir, count)
    after_some_steps(launcher, workdir)
    os.kill(process_with(f"JAX_PROCESS_ID={killed}", str(workdir)), signal.SIGKILL)
    began = time.monotonic()
    code, output = runs.end(launcher, 120)
    assert code == 75, output
    assert time.monotonic() - began < 60
    assert f"process {killed} was killed by SIGKILL" in output
    assert read_metrics(workdir / "metrics.jsonl")[-1]["step"] < 20

    code, output = runs.end(train(folder, workdir, afterwards), 900)
    assert code == 0, output
    assert "resumed from step" in output
    same_but_for_rounding(workdir, undisturbed)


@pytest.mark.slow
def test_sigterm_to_one_process_saves_in_all(folder, tmp_path, undisturbed):
    """As where one machine of several is taken away: they agree on a step, and lose none."""
    workdir = tmp_path / "w"
    launcher = train(folder, workdir, 2)
    after_some_steps(launcher, workdir)
    os.kill(process_with("JAX_PROCESS_ID=1", str(workdir)), signal.SIGTERM)
    code, output = runs.end(launcher, 120)
    assert code == 75, output
    last = read_metrics(workdir / "metrics.jsonl")[-1]["step"]
    assert f"stopped by SIGTERM after step {last}; the same command goes on from there" in output

    code, output = runs.end(train(folder, workdir, 2), 900)
    assert code == 0, output
    assert f"resumed from step {last} of" in output
    same_but_for_rounding(workdir, undisturbed)


def process_with(variable: str, argument: str) -> int:
    """The main of a run, by its environment and a part of its command line."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command, environment = ((folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if (
            variable.encode() in environment
            and b"blip2_jax.main" in command
            and any(argument.encode() in word for word in command)
        ):
            return int(folder.name)
    raise AssertionError(f"no process of {argument} has {variable}")
