"""Two processes on this machine are one run: they compute what one process with as many devices does."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from blip2_jax import tasks
from blip2_jax.checkpoints.store import Store
from blip2_jax.monitoring.metrics import read_metrics
from blip2_jax.parallel import mesh as meshes
from blip2_jax.parallel import processes, sharding
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
    store.save(state)
    assert store.settle() is None
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


def pictures(folder: pathlib.Path, tmp_path: pathlib.Path) -> str:
    """19 records, of which the sixth cannot be used; in batches of 8 the last has rows of the first process alone."""
    tiny.recipe("stage1", folder)  # Makes the models and the pictures.
    records = [json.loads(line) for line in (folder / "pictures" / "pictures.jsonl").read_text().splitlines()]
    records = [record | {"image": str(folder / "pictures" / record["image"])} for record in records]
    records.insert(5, {"image": "missing.png", "caption": "a red square"})
    (tmp_path / "pictures.jsonl").write_text("\n".join(map(json.dumps, records)))
    return f"jsonl:{tmp_path / 'pictures.jsonl'}"


def recipe(stage: str, folder: pathlib.Path, **changes):
    """Tiny, on the mesh of these tests; nano's encoder tells pictures apart, so that rounding orders none of them."""
    own = {"model.layers": 2, "model.unroll": 1, "mesh": MESH}
    return tiny.recipe(stage, folder, **(own | changes))


def evaluated(folder: pathlib.Path, source: str) -> dict:
    """What evaluation finds of each stage before training."""
    found = {}
    for stage in ("stage1", "stage2"):
        task = tasks.create(recipe(stage, folder, init="scratch", **{"data.eval": source}))
        task.mesh = meshes.make_mesh(MESH, jax.devices()[:4])
        (shown,) = task.evaluation_pictures().values()
        start = task.initialize(jax.random.key(0))
        trainable = jax.tree.map(sharding.put, start, sharding.shardings(start, task.mesh))
        found[stage] = task.evaluate(trainable, shown)
    return found


def same_metrics(found: dict, expected: dict) -> None:
    """Losses to rounding; what is counted, exactly."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        counted = "retrieval" in name or "accuracy" in name or "exact_match" in name
        np.testing.assert_allclose(found[name], value, rtol=0 if counted else 1e-4, atol=1e-6, err_msg=name)


def test_two_processes_evaluate_as_one_does(folder, own_cache, tmp_path, capsys):
    source = pictures(folder, tmp_path)
    expected = evaluated(folder, source)
    assert "left out of" in capsys.readouterr().err
    assert {"loss_itc", "loss_itm", "loss_itg", "retrieval/itm/image_to_text/r1"} <= expected["stage1"][0].keys()
    command = ["tests.test_processes", str(tmp_path), str(folder), source]
    outputs = start(command, 2, BLIP2_JAX_CACHE=str(tmp_path / "cache"))
    both = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    assert both[0] == both[1]
    for stage, (metrics, samples) in both[0].items():
        same_metrics(metrics, expected[stage][0])
        drop = lambda sample: {name: value for name, value in sample.items() if name != "similarity"}
        assert [drop(sample) for sample in samples] == [drop(sample) for sample in expected[stage][1]]
    # Its image tokens are those of this process, each file written by one of the two; all know what is left out.
    assert all("missing.png" in output for output in outputs)
    files = sorted(file.name for file in (tmp_path / "cache" / "features").rglob("*") if file.is_file())
    assert files == ["00000-of-00001.arrayrecord", "features.json"]


def test_a_recorded_case_in_two_processes():
    """As `pytest tests/parity --processes=2` runs all of them."""
    parity = ["pytest", "tests/parity", "--mesh=data=2,fsdp=2", "--processes=2"]
    (ended,) = together.run([*parity, "-k", "stage1_ws1-gradients"], 1, 1)
    assert ended.code == 0, ended.output
    assert "1 passed" in ended.output


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
@pytest.mark.parametrize("views", [0, 2])
def test_two_processes_train_as_one_does(stage, views, folder, tmp_path):
    """From the command to the checkpoint, which two processes read again; with evaluation on the way."""
    source = pictures(folder, tmp_path)
    changes = {"data.feature_views": views, "data.eval": source, "total_steps": 4, "eval_every": 2, "init": "scratch"}
    config = recipe(stage, folder, **changes)
    file = tiny.recipe_file(config, tmp_path / "recipe.py")

    def train(name, count):
        command = ["blip2_jax.main", f"--config={file}", f"--workdir={tmp_path / name}"]
        return start(command, count, BLIP2_JAX_CACHE=str(tmp_path / f"cache_{name}"))

    train("one", 1)
    first, second = train("two", 2)
    assert "qformer/query_tokens" in first
    assert "qformer/query_tokens" not in second
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    assert [row["step"] for row in rows[1]] == [1, 2, 4]
    plain = lambda row: {name: value for name, value in row.items() if not name.startswith("timing/")}
    for left, right in zip(*rows, strict=True):
        assert any(name.startswith("eval/") for name in left) == (left["step"] > 1)
        same_metrics(plain(right), plain(left))
    before = (tmp_path / "two" / "metrics.jsonl").read_text()
    assert "resumed from step 4" in train("two", 2)[0]
    assert (tmp_path / "two" / "metrics.jsonl").read_text() == before


if __name__ == "__main__":
    processes.join(None)
    output, more = pathlib.Path(sys.argv[1]), sys.argv[2:]
    result = evaluated(pathlib.Path(more[0]), more[1]) if more else steps(output)
    (output / f"{jax.process_index()}.json").write_text(json.dumps(result))
