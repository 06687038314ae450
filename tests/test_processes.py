"""Two processes on this machine are one run: they compute what one process with as many devices does."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from blip2_jax.checkpoints.store import Store
from blip2_jax.monitoring.metrics import read_metrics
from blip2_jax.parallel import mesh as meshes
from blip2_jax.parallel import processes
from tests import processes as together
from tests import test_step, tiny

MESH = "data=2,fsdp=2"


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


def start(command: list[str], count: int, **environment: str) -> list[str]:
    """Run a command in so many processes of together four devices; what each wrote."""
    ended = together.run(command, count, 4, **environment)
    assert all(end.code == 0 for end in ended), "\n\n".join(end.output for end in ended)
    return [end.output for end in ended]


def steps(folder: pathlib.Path) -> dict:
    """Two steps, a checkpoint, and a third one from what it brings back; the second is not finite."""
    mesh, state, places, step = test_step.start(MESH)
    rows, found = meshes.own_rows(8, mesh), []

    def advance(state, number, poison=1.0):
        own = {name: array[rows] for name, array in test_step.batch(number, poison).items()}
        with jax.set_mesh(mesh):
            state, metrics = step(state, test_step.FROZEN, meshes.global_batch(own, 8, mesh))
        found.append({name: np.asarray(value).item() for name, value in metrics.items()})
        return state

    state = advance(advance(state, 0), 1, np.nan)
    store = Store(folder / "checkpoints")
    store.save(state, {}, {}, {})
    state = store.restore(test_step.start(MESH)[1])
    store.close()
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, place: leaf.sharding == place, state, places)))
    state = advance(state, 2)
    everywhere = jax.jit(lambda tree: tree, out_shardings=meshes.replicated(mesh))(state.trainable)
    kernel = np.asarray(everywhere["vision_proj"]["kernel"])
    return {"rows": rows.tolist(), "metrics": found, "kernel": kernel.tolist()}


def test_two_processes_step_as_one_does(tmp_path):
    found = []
    for count in (1, 2):
        start(["tests.test_processes", str(tmp_path / str(count))], count)
        for number in range(count):
            found.append(json.loads((tmp_path / str(count) / f"{number}.json").read_text()))
    one, first, second = found
    assert (one["rows"], first["rows"], second["rows"]) == ([*range(8)], [0, 1, 2, 3], [4, 5, 6, 7])
    assert [row["skipped_steps"] for row in first["metrics"]] == [0, 1, 1]
    for alone, left, right in zip(one["metrics"], first["metrics"], second["metrics"], strict=True):
        np.testing.assert_array_equal([*left.values()], [*right.values()])
        np.testing.assert_allclose([*left.values()], [*alone.values()], rtol=1e-6)
    np.testing.assert_allclose(first["kernel"], one["kernel"], rtol=1e-6)


def test_a_recorded_case_in_two_processes():
    """As `pytest tests/parity --processes=2` runs all of them."""
    parity = ["pytest", "tests/parity", "--mesh=data=2,fsdp=2", "--processes=2"]
    (ended,) = together.run([*parity, "-k", "stage1_ws1-gradients"], 1, 1)
    assert ended.code == 0, ended.output
    assert "1 passed" in ended.output


@pytest.mark.slow
def test_two_processes_train_as_one_does(folder, tmp_path):
    """From the command to the checkpoint, which two processes read again."""
    tiny.recipe("stage1", folder)  # Which makes the files.
    changes = {"data.feature_views": 0, "data.eval": "", "total_steps": 4, "vision": f"hf:{folder / 'vit'}"}
    config = tiny.recipe("stage1", folder, mesh=MESH, **changes)
    file = tmp_path / "recipe.py"
    file.write_text(
        f"import json\nfrom ml_collections import ConfigDict\ndef get_config():\n"
        f"    return ConfigDict(json.loads({config.to_json()!r}))\n"
    )

    def train(name, count):
        command = ["blip2_jax.main", f"--config={file}", f"--workdir={tmp_path / name}"]
        return start(command, count, BLIP2_JAX_CACHE=str(folder / "cache"))

    train("one", 1)
    first, second = train("two", 2)
    assert "vision_proj/kernel" in first
    assert "vision_proj/kernel" not in second
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert [row["step"] for row in rows[1]] == [1, 2, 4]
    for left, right in zip(*rows, strict=True):
        for name in left:
            if not name.startswith("timing/"):
                np.testing.assert_allclose(right[name], left[name], rtol=1e-5, atol=1e-6, err_msg=name)
    before = (tmp_path / "two" / "metrics.jsonl").read_text()
    assert "resumed from step 4" in train("two", 2)[0]
    assert (tmp_path / "two" / "metrics.jsonl").read_text() == before


if __name__ == "__main__":
    processes.join(None)
    output = pathlib.Path(sys.argv[1])
    result = steps(output)
    (output / f"{jax.process_index()}.json").write_text(json.dumps(result))
