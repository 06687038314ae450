"""Two processes on this machine are one run: its metrics are those of one process with as many devices."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from blip2_jax.monitoring.metrics import read_metrics
from blip2_jax.parallel import processes
from tests import tiny


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1234"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
    ],
)
def test_the_environment_says_whether_there_are_others(environment, several):
    assert processes.expected(environment) == several


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train(folder, config, workdir, count):
    """Train with so many processes of together four devices; what each wrote to stderr."""
    file = folder / "recipe_of_processes.py"
    file.write_text(
        f"import json\nfrom ml_collections import ConfigDict\ndef get_config():\n"
        f"    return ConfigDict(json.loads({config.to_json()!r}))\n"
    )
    command = [sys.executable, "-m", "blip2_jax.main", f"--config={file}", f"--workdir={workdir}"]
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(4 // count),
        "BLIP2_JAX_CACHE": str(folder / "cache"),
        "JAX_PLATFORMS": "cpu",
    }
    if count > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    running = [
        subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(number)}, stderr=subprocess.PIPE, text=True)
        for number in range(count)
    ]
    try:
        errors = [process.communicate(timeout=900)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), errors
    return errors


@pytest.mark.slow
def test_two_processes_train_as_one_does(folder, tmp_path):
    changes = {"mesh": "data=2,fsdp=2", "data.feature_views": 0, "data.eval": "", "total_steps": 4}
    tiny.recipe("stage1", folder)  # Which makes the files.
    changes["vision"] = f"hf:{folder / 'vit'}"
    config = tiny.recipe("stage1", folder, **changes)
    train(folder, config, tmp_path / "one", 1)
    first, second = train(folder, config, tmp_path / "two", 2)
    assert "parameters" in first
    assert "parameters" not in second
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert [row["step"] for row in rows[1]] == [1, 2, 4]
    for left, right in zip(*rows, strict=True):
        for name in left.keys() - {name for name in left if name.startswith("timing/")}:
            np.testing.assert_allclose(right[name], left[name], rtol=1e-5, atol=1e-6, err_msg=name)
    # The state of two is read by two, and goes on from there.
    before = (tmp_path / "two" / "metrics.jsonl").read_text()
    first, _ = train(folder, config, tmp_path / "two", 2)
    assert "resumed from step 4" in first
    assert (tmp_path / "two" / "metrics.jsonl").read_text() == before
    assert json.loads((tmp_path / "two" / "checkpoints" / "4" / "frozen.json").read_text())
