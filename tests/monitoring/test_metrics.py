"""Rows: metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import json
import struct
import sys
import types

import ml_collections
import pytest
from tensorboardX.proto.event_pb2 import Event

from blip2_jax.monitoring import charts, weights_and_biases
from blip2_jax.monitoring.metrics import MetricsWriter, read_metrics
from blip2_jax.monitoring.weights_and_biases import WeightsAndBiases


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 2})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')  # A kill cuts a line short.
    again = MetricsWriter(tmp_path, 2)
    assert [row["step"] for row in again.rows] == [1, 2]
    again.write(3, {"loss": 9.0})
    again.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 9.0},
    ]


def test_what_is_not_finite_is_null(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step, loss in ((1, 2.0), (2, float("nan")), (3, float("inf")), (4, 1.0)):
        writer.write(step, {"loss": loss, "loss_itc": float("nan"), "itm_accuracy_positive": loss})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    MetricsWriter(tmp_path, 4).close()  # A resumed run reads and writes it again.
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [2.0, None, None, 1.0]
    page = charts.curves([*rows, {"step": 5, "itm_accuracy_negative": None}])
    assert page.count("<polyline") == 4  # Two curves, each pale and smooth.
    assert "None" not in page


def read_events(file):
    """TFRecords: length uint64, its checksum uint32, an Event, its checksum uint32."""
    content, position = file.read_bytes(), 0
    while position < len(content):
        (length,) = struct.unpack_from("<Q", content, position)
        yield Event.FromString(content[position + 12 : position + 12 + length])
        position += 16 + length


def test_tensorboard_sees_every_number_at_once_and_forgets_steps_done_again(tmp_path):
    writer = MetricsWriter(tmp_path, 4)
    writer.write(5, {"loss": 0.5, "seen": 64, "broken": float("nan"), "name": "nobody", "alarm/itm_stuck": 1})
    (file,) = (tmp_path / "tensorboard").glob("*tfevents*")
    first, restart, row = read_events(file)
    assert first.file_version == "brain.Event:2"
    assert (restart.step, restart.session_log.status) == (5, restart.session_log.START)
    assert row.step == 5
    shown = {value.tag: value.simple_value for value in row.summary.value}
    assert shown == {"loss": 0.5, "seen": 64.0, "alarm/itm_stuck": 1.0}
    writer.close()


KEY = "0123456789abcdef-secret"


class FakeRun:
    """As the service: a step below one that it has seen is refused."""

    def __init__(self, service, options):
        self.service, self.options, self.ended = service, options, None
        self.rows = service.histories.setdefault(options["id"], {})

    def log(self, row, step):
        if self.service.down:
            raise RuntimeError(f"no answer to {KEY}")
        assert step > max(self.rows, default=-1), "a step twice"
        self.rows[step] = row

    def finish(self, exit_code):
        self.ended = exit_code


class FakeService(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace()  # What find_spec looks at.
        self.histories, self.runs, self.down, self.refuses = {}, [], False, False

    def Settings(self, **options):
        return options

    def init(self, **options):
        if self.refuses:
            raise RuntimeError(f"the key {KEY} is not known")
        self.runs.append(FakeRun(self, options))
        return self.runs[-1]


@pytest.fixture
def service(monkeypatch):
    service = FakeService()
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return service


def block(**changes):
    return ml_collections.ConfigDict({**weights_and_biases.block().to_dict(), "project": "blip2", **changes})


def open_writer(workdir, resumed_at):
    recipe = {"task": "stage1", "batch_size": 8}
    return MetricsWriter(workdir, resumed_at, lambda: WeightsAndBiases(workdir, block(name="mine"), recipe))


def test_a_resumed_run_is_the_same_run_there_and_no_row_comes_twice(service, tmp_path):
    writer = open_writer(tmp_path, 0)
    for step in (1, 2, 4, 6):
        writer.write(step, {"loss": step / 2, "loss_itc": float("nan")})
    # Killed here: nothing is closed. The run goes on from step 2.
    writer = open_writer(tmp_path, 2)
    for step in (4, 6, 8):
        writer.write(step, {"loss": step / 2})
    writer.close()
    first, second = service.runs
    assert first.options["id"] == second.options["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert second.options["resume"] == "allow"
    assert (first.options["project"], first.options["name"], first.options["mode"]) == ("blip2", "mine", None)
    assert first.options["config"] == {"task": "stage1", "batch_size": 8}
    assert second.rows == {step: {"loss": step / 2} for step in (1, 2, 4, 6, 8)}
    assert (first.ended, second.ended) == (None, 0)


def test_a_run_that_is_told_later_is_told_of_its_first_rows_too(service, tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(1, {"loss": 0.5})
    writer.close()
    open_writer(tmp_path, 1).write(2, {"loss": 1.0})
    assert service.runs[0].rows == {1: {"loss": 0.5}, 2: {"loss": 1.0}}


def test_a_run_that_fails_is_said_to_have_failed(service, tmp_path):
    with contextlib.suppress(FloatingPointError):
        writer = open_writer(tmp_path, 0)
        try:
            raise FloatingPointError
        finally:
            writer.close()
    assert service.runs[0].ended == 1


def test_a_service_that_goes_down_stops_nothing_and_the_key_is_nowhere(service, tmp_path, capsys):
    writer = open_writer(tmp_path, 0)
    writer.write(1, {"loss": 0.5})
    service.down = True
    for step in (2, 3):
        writer.write(step, {"loss": 0.5})
    writer.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    told = capsys.readouterr().err
    assert told.count("is told no more") == 1
    service.refuses = True
    with pytest.raises(
        ValueError, match=r"refuses the project 'blip2': the key \*\*\* is not known; run `wandb login`"
    ):
        open_writer(tmp_path, 3)
    assert KEY not in told
    for file in filter(lambda path: path.is_file(), tmp_path.rglob("*")):
        assert KEY.encode() not in file.read_bytes()


def test_what_cannot_be_is_an_error_before_anything_starts(monkeypatch, service):
    weights_and_biases.check(block(mode="offline"))
    weights_and_biases.check(weights_and_biases.block())
    with pytest.raises(ValueError, match=r"wandb.mode = 'sometimes': expected online, offline"):
        weights_and_biases.check(block(mode="sometimes"))
    with pytest.raises(ValueError, match=r"without wandb.project"):
        weights_and_biases.check(block(project="", name="mine"))
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb is not there: pip install 'blip2_jax\[wandb\]'"):
        weights_and_biases.check(block())
