"""launch/tpu_vm.sh: the commands that it would run, and these on hosts that are folders of this machine."""

import pathlib
import shlex
import subprocess
import sys
import time

import pytest

from tests.launch import gcloud, runs

SCRIPT = runs.LAUNCH / "tpu_vm.sh"
GOLDEN = runs.ROOT / "tests" / "golden" / "launch" / "tpu_vm.txt"
REFRESH = f"python -m tests.launch.test_tpu_vm > {GOLDEN.relative_to(runs.ROOT)}"

WHERE = ["--name=blip2", "--zone=us-central2-b"]
RUN = ["--config=configs/stage1.py:eva_g", "--workdir=/shared/my runs", "--config.batch_size=1024"]
SETUP = "--setup=sudo mkdir -p /shared && sudo mount 10.0.0.2:/share /shared"
DRY_RUNS = [
    ["create", *WHERE, "--type=v4-32"],
    ["create", *WHERE, "--type=v5e-16", "--spot", "--project=mine"],
    ["create", *WHERE, "--type=v5p-32", "--runtime=v2-other"],
    ["create", *WHERE, "--type=v6e-16", "--queued"],
    ["create", *WHERE, "--type=v6e-256", "--slices=2", "--spot"],
    ["install", *WHERE, SETUP],
    ["install", *WHERE, "--slices=2"],
    ["start", *WHERE, *RUN],
    ["follow", *WHERE, "--worker=3"],
    ["status", *WHERE, "--queued"],
    ["stop", *WHERE],
    ["resume", *WHERE, "--type=v5e-16", "--spot", SETUP, *RUN],
    ["delete", *WHERE],
    ["delete", *WHERE, "--slices=2"],
]


def dry_runs() -> str:
    """What all of DRY_RUNS print."""
    text = ""
    for arguments in DRY_RUNS:
        command = ["bash", str(SCRIPT), *arguments, "--dry-run"]
        # Nothing but what the script needs to print: it must not look for a cloud.
        printed = subprocess.run(
            command, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"}
        ).stdout
        text += f"$ bash launch/tpu_vm.sh {shlex.join(arguments)} --dry-run\n{printed}\n"
    return text


def test_a_dry_run_prints_the_commands():
    assert dry_runs() == GOLDEN.read_text(), f"other commands than recorded; if they should be: {REFRESH}"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([""], "'' is no command: create, install"),
        (["begin", *WHERE], "'begin' is no command"),
        (["create", "--zone=z", "--type=v4-8"], "create needs --name=NAME"),
        (["stop", "--name=n"], "stop needs --zone=ZONE"),
        (["create", *WHERE], "create needs --type="),
        (["create", *WHERE, "--type=v9-8"], "no runtime is known for --type=v9-8"),
        (["start", *WHERE, "--workdir=w"], "start needs --config="),
        (["resume", *WHERE, "--config=c"], "resume needs --workdir="),
        (["resume", *WHERE, "--config=c", "--workdir=w"], "resume needs --type="),
        (["start", *WHERE, "--config=c", "--workdir=gs://b/w"], "--workdir=gs://b/w is an address"),
        (["start", *WHERE, "--wrokdir=w"], "--wrokdir=w is no option"),
        (["create", *WHERE, "--type=v4-8", "--slices=two"], "--slices is 'two'"),
    ],
)
def test_what_is_missing_is_named(arguments, says):
    code, output = runs.end(runs.start(SCRIPT, *arguments, "--dry-run"), 30)
    assert code == 2
    assert output.startswith("error: ")
    assert says in output


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A function that runs the script in a cloud of folders; and the folder."""
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "gcloud").write_text(f'#!/bin/sh\nexec {sys.executable} {gcloud.__file__} "$@"\n')
    (commands / "gcloud").chmod(0o755)
    monkeypatch.setenv("GCLOUD_HOSTS", str(tmp_path / "hosts"))
    monkeypatch.setenv("PATH", f"{commands}:{runs.environment()['PATH']}")
    (tmp_path / "hosts").mkdir()

    def run(command: str, *options: str, code: int = 0) -> str:
        found, output = runs.end(runs.start(SCRIPT, command, *WHERE, *options), 120)
        assert found == code, output
        return output

    return run, tmp_path / "hosts"


def provide(hosts: pathlib.Path, program: str) -> None:
    """On every host a python that installs nothing, and runs a program in the place of main."""
    for host in (hosts / "blip2").iterdir():
        (host / "program.py").write_text(f"import os, signal, sys, time\n{program}")
        python = host / "blip2_jax" / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(
            f'#!/bin/sh\ncase "$1 $2" in\n"-m pip") ;;\n"-m blip2_jax.main") exec {sys.executable} -u'
            f' {host / "program.py"} "$@" ;;\n*) exec {sys.executable} "$@" ;;\nesac\n'
        )
        python.chmod(0o755)


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_on_two_hosts_from_create_to_delete(cloud):
    run, hosts = cloud
    run("create", "--type=v4-16")
    # It stops when asked to; the first start ends with 75 at once, as one that was preempted.
    provide(
        hosts,
        "print('start', sys.argv[1:])\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "if not os.path.exists('again'): open('again', 'w'); sys.exit(75)\n"
        "time.sleep(300)",
    )
    run("install", "--setup=touch mounted")
    folders = [hosts / "blip2" / str(host) for host in range(2)]
    for folder in folders:
        assert (folder / "mounted").exists()
        assert (folder / "blip2_jax" / "launch" / "local.sh").read_text() == (runs.LAUNCH / "local.sh").read_text()
    logs = [folder / "blip2_jax" / "run.log" for folder in folders]
    run("start", *RUN)
    try:
        until(lambda: all(log.read_text().count("start [") == 2 for log in logs))
        arguments = ["-m", "blip2_jax.main", "--distributed", *RUN]
        for log in logs:
            assert f"[0] start {arguments}" in log.read_text()
            assert "starting again (1 of 100)" in log.read_text()
        assert "a run is going on here" in run("start", *RUN, code=1)
        assert run("status").splitlines().count("running") == 2
    finally:
        run("stop")
    assert run("status").splitlines().count("not running") == 2
    run("delete")
    assert not (hosts / "blip2").exists()


def test_resume_starts_what_is_there_and_makes_anew_what_was_preempted(cloud):
    run, hosts = cloud
    run("create", "--type=v4-16")
    provide(hosts, "")
    run("install")
    run("resume", *RUN, "--type=v4-16")
    calls = lambda: (hosts / "calls").read_text().splitlines()
    assert calls()[-2:] == ["tpu-vm describe", "tpu-vm ssh"]
    (hosts / "state").write_text("PREEMPTED")
    before = len(calls())
    # The new hosts have no python of ours: that the install fails on them shows that they are new.
    run("resume", *RUN, "--type=v4-16", "--setup=exit 7", code=7)
    assert calls()[before:] == [f"tpu-vm {verb}" for verb in ("describe", "delete", "create", "scp", "ssh")]
    (hosts / "state").write_text("CREATING")
    assert "blip2 is CREATING: wait" in run("resume", *RUN, "--type=v4-16", code=2)


if __name__ == "__main__":
    print(dry_runs(), end="")
