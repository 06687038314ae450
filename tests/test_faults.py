"""What goes wrong in days of training, one thing at a time: the run mends it or ends clearly, and loses nothing."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from blip2_jax import files, params, trainer
from blip2_jax import workdir as workdirs
from blip2_jax.checkpoints import manifest, store
from blip2_jax.monitoring.metrics import read_metrics
from tests import tiny
from tests.runs import same_parameters, same_rows


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    monkeypatch.setenv("BLIP2_JAX_CACHE", str(folder / "cache"))
    monkeypatch.setattr(files, "PATIENCE", (0.01, 0.02))


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Failing:
    """A function that fails as a full disk does, so many times."""

    def __init__(self, function, times):
        self.function, self.left = function, times

    def __call__(self, *arguments, **options):
        self.left -= 1
        return full() if self.left >= 0 else self.function(*arguments, **options)


def test_storage_that_fails_for_a_while_costs_nothing(folder, stage1, tmp_path, monkeypatch, capsys):
    """The checkpoint of step 2 cannot be written at first, and then a row of metrics."""
    monkeypatch.setattr(manifest, "write", Failing(manifest.write, 2))
    append = files.Appender._append
    lost = iter([True, False])

    def now_and_then(self, line):
        if b'"step": 4' in line and next(lost, False):
            self._stream.write(line[:7])  # A disk takes what it can.
            full()
        append(self, line)

    monkeypatch.setattr(files.Appender, "_append", now_and_then)
    trainer.train(tiny.recipe("stage1", folder), tmp_path / "w")
    said = capsys.readouterr().err
    assert said.count("a checkpoint could not be written: [Errno 28] No space left") == 2
    same_parameters(stage1, tmp_path / "w")


@pytest.mark.usefixtures("capsys")  # Else what is told goes to a file, which cannot grow either.
def test_storage_that_takes_no_more_ends_it_with_the_last_checkpoint_whole(folder, stage1, tmp_path):
    """From step 3 on no file can grow beyond some bytes, as a quota has it."""
    run = trainer.Run(tiny.recipe("stage1", folder), tmp_path / "w")
    original, (_, hard) = run.step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def step(state, *arguments):
        if int(state.step) == 2:
            assert run.store.settle() is None
            resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
        return original(state, *arguments)

    run.step = step
    try:
        with pytest.raises(
            OSError, match=r"no checkpoint can be written in (.|\n)*the last whole one is of step 2, from"
        ):
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert manifest.steps(tmp_path / "w" / "checkpoints") == [2]
    assert not manifest.damage(tmp_path / "w" / "checkpoints" / "2")
    trainer.train(tiny.recipe("stage1", folder), tmp_path / "w")
    same_parameters(stage1, tmp_path / "w")
    same_rows(stage1, tmp_path / "w")


def test_a_workdir_that_cannot_be_made(folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file"):
        trainer.train(tiny.recipe("stage1", folder), tmp_path / "file" / "w")


@pytest.mark.parametrize("lost", ["manifest.ocdbt", "frozen.json", "_METADATA"])
def test_a_damaged_newest_checkpoint_is_made_again(folder, stage1, tmp_path, capsys, lost):
    workdir = tmp_path / "w"
    shutil.copytree(stage1, workdir)
    for file in (workdir / "checkpoints" / "6").rglob(lost):
        os.truncate(file, 5)
    trainer.train(tiny.recipe("stage1", folder), workdir)
    said = capsys.readouterr().err
    assert "the checkpoint of step 6 is damaged: " in said
    assert "resumed from step 4" in said
    same_parameters(stage1, workdir)
    same_rows(stage1, workdir)


def test_metrics_that_the_storage_lost_come_back(folder, stage1, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(stage1, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    (workdir / "metrics.jsonl").write_text('{"step": 1, "lo')
    trainer.train(tiny.recipe("stage1", folder), workdir)
    same_rows(stage1, workdir)


def test_batches_that_are_not_finite_end_the_run_and_are_kept(folder, tmp_path):
    config = tiny.recipe("stage1", folder, max_skipped_in_a_row=2)
    run = trainer.Run(config, tmp_path / "w")
    original, spoilt = run.step, {}

    def step(state, frozen, batch):
        factor = np.float16(np.nan if int(state.step) >= 2 else 1)
        batch = batch | {"image_embeds": batch["image_embeds"] * factor}
        spoilt[int(state.step) + 1] = batch
        return original(state, frozen, batch)

    run.step = step
    with pytest.raises(FloatingPointError, match=r"2 steps in a row .* up to step 4.* the batch is in .*4-0\.npz"):
        run.train()
    with np.load(tmp_path / "w" / "nonfinite" / "4-0.npz") as kept:  # Which loads no pickle.
        assert json.loads(str(kept["metrics"]))["skipped_in_a_row"] == 2
        np.testing.assert_array_equal(kept["text_ids"], np.asarray(spoilt[4]["text_ids"]))
        assert set(kept) == {*spoilt[4], "metrics"}


def test_other_frozen_weights_are_refused(folder, stage1, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(stage1, workdir)
    checkpoint = store.find_checkpoint(workdir)
    frozen = json.loads((checkpoint / "frozen.json").read_text())
    frozen["vision"]["sha256"] = "0" * 64
    (checkpoint / "frozen.json").write_text(json.dumps(frozen))
    (checkpoint / "manifest.json").unlink()  # Else it would be damaged.
    with pytest.raises(ValueError, match="vision"):
        trainer.train(tiny.recipe("stage1", folder), workdir)
    assert (workdir / "metrics.jsonl").read_text() == (stage1 / "metrics.jsonl").read_text()


def test_a_second_run_in_the_workdir_is_refused(folder, stage1, tmp_path):
    workdir = tmp_path / "w"
    shutil.copytree(stage1, workdir)
    file = tiny.recipe_file(tiny.recipe("stage1", folder), tmp_path / "recipe.py")
    command = [sys.executable, "-m", "blip2_jax.main", f"--config={file}", f"--workdir={workdir}"]
    with workdirs.locked(workdir):
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 1
    assert f"{workdir} is in use by another run (process {os.getpid()} on" in second.stderr
    assert (workdir / "metrics.jsonl").read_text() == (stage1 / "metrics.jsonl").read_text()


def test_it_goes_on_with_other_settings_that_change_nothing(folder, stage1, tmp_path):
    """Fewer devices, another cadence; and the best checkpoint is kept."""
    workdir = tmp_path / "w"
    shutil.copytree(stage1, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    (source,) = {name.split("/retrieval")[0] for name in read_metrics(stage1 / "metrics.jsonl")[-1] if "/retr" in name}
    best = f"{source}/retrieval/itc/text_to_image/r1"
    changes = {"mesh": "data=4,tensor=2", "checkpoint_every": 5, "eval_every": 5, "log_every": 1, "keep_best": best}
    trainer.train(tiny.recipe("stage1", folder, **changes), workdir)
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4, 5, 6]
    expected = read_metrics(stage1 / "metrics.jsonl")
    for name in ("loss", "gradient_norm", "learning_rate"):
        np.testing.assert_allclose(rows[-1][name], expected[-1][name], rtol=1e-3, err_msg=name)
    evaluated = {row["step"]: row[best] for row in rows if best in row}
    kept = manifest.steps(workdir / "checkpoints")
    assert set(evaluated) == {5, 6}
    assert max(evaluated, key=lambda step: (evaluated[step], step)) in kept


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_save_and_say_whether_to_start_again(folder, stage1, tmp_path, number, code):
    file = tiny.recipe_file(tiny.recipe("stage1", folder), tmp_path / "recipe.py")
    workdir = tmp_path / "w"
    command = [sys.executable, "-m", "blip2_jax.main", f"--config={file}", f"--workdir={workdir}"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not read_metrics(workdir / "metrics.jsonl"):
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == code, said
    assert f"stopped by {number.name} after step" in said
    assert "the same command goes on from there" in said
    trainer.train(tiny.recipe("stage1", folder), workdir)
    same_parameters(stage1, workdir)


def test_where_a_run_stands_still_is_told(folder, tmp_path):
    """A record that takes long: the stacks of all threads say where."""
    file = tiny.recipe_file(tiny.recipe("stage1", folder, watchdog_minutes=0.05, total_steps=2), tmp_path / "recipe.py")
    code = (
        "import sys, time\nfrom blip2_jax import main, trainer\nfrom absl import app\n"
        "make = trainer.training_batches\n"
        "def a_record_that_hangs(batches):\n"
        "    yield next(batches)\n    time.sleep(8)\n    yield from batches\n"
        "trainer.training_batches = lambda *a, **o: a_record_that_hangs(make(*a, **o))\n"
        "app.run(main.main)\n"
    )
    command = [sys.executable, "-c", code, f"--config={file}", f"--workdir={tmp_path / 'w'}"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "no step has ended for 0.05 minutes, the last one was 1; what every thread does:" in ended.stderr
    assert "in a_record_that_hangs" in ended.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "w" / "metrics.jsonl")] == [1, 2]


def test_what_a_run_was_started_with_is_in_its_checkpoint(stage1):
    checkpoint = store.find_checkpoint(stage1)
    assert json.loads((checkpoint / "config.json").read_text()) == json.loads((stage1 / "config.json").read_text())
    assert [row["step"] for row in read_metrics(checkpoint / "metrics.jsonl")] == [1, 2, 4, 6]
    assert params.flatten(store.load_trainable(checkpoint))
