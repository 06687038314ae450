"""A workdir belongs to one run at a time, and to one configuration."""

import json
import os
import signal
import subprocess
import sys

import pytest

from blip2_jax import workdir

HOLD = "import pathlib, sys, time; from blip2_jax import workdir\n"
HOLD += "with workdir.locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path):
    """Gone by SIGKILL: nothing that it leaves behind is in the way."""
    (tmp_path / "something").touch()
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    said = rf"{tmp_path} is in use by another run \(process {first.pid} on .*, since .*\): wait until it ends, stop it"
    with pytest.raises(BlockingIOError, match=said), workdir.locked(tmp_path):
        pass
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    with workdir.locked(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / "run.lock").read_text()


def test_a_workdir_in_which_nothing_came_to_be_is_gone(tmp_path):
    with pytest.raises(ValueError, match="nonsense"), workdir.locked(tmp_path / "a" / "w"):
        raise ValueError("nonsense")
    assert not (tmp_path / "a" / "w").exists()
    with workdir.locked(tmp_path / "a" / "w"):
        (tmp_path / "a" / "w" / "config.json").touch()
    assert sorted(file.name for file in (tmp_path / "a" / "w").iterdir()) == ["config.json", "run.lock"]


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"mesh": "data=1"}, False),
        ({"checkpoint_every": 7}, False),
        ({"wandb": {"project": "blip2"}, "alarms": {"window": 30}}, False),
        ({"data": {"threads": 9, "train": "nano:train"}}, False),
        ({"batch_size": 64}, True),
        ({"data": {"threads": 2, "train": "nano:val"}}, True),
    ],
)
def test_what_a_run_may_go_on_with(tmp_path, change, refused):
    known = {"task": "none", "batch_size": 8, "mesh": "data=8", "checkpoint_every": 5}
    known |= {"data": {"threads": 2, "train": "nano:train"}}
    (tmp_path / "config.json").write_text(json.dumps(known))
    if not refused:
        workdir.refuse_other_configuration(tmp_path, known | change)
        return
    with pytest.raises(ValueError, match=r"another configuration:\n  .* there, .* asked for\nChoose another"):
        workdir.refuse_other_configuration(tmp_path, known | change)
