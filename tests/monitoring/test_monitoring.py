"""What a person reads: metrics, curves, tables beside baselines, attention over pictures."""

import json
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from blip2_jax.monitoring import comparison, report
from blip2_jax.monitoring.clock import Clock
from blip2_jax.monitoring.metrics import MetricsWriter, read_metrics
from tests import tiny

SPLITS = {
    "test_drawing": {
        "retrieval": {"itc": {"text_to_image": {"r1": 0.5, "r5": 0.7}}},
        "question": {"accuracy": 0.3},
        "shuffled_image_loss_increase": 1.25,
        "baselines": {
            "chance": {"retrieval": {"text_to_image": {"r1": 0.01, "r5": 0.05}}},
            "majority": {"question": {"accuracy": 0.4}},
        },
    }
}


def test_rows_stand_beside_their_baselines():
    rows = {row.label: row for row in comparison.rows(SPLITS["test_drawing"])}
    assert rows["text to image R@1, ITC"].baselines[0] == 0.01
    assert not rows["text to image R@1, ITC"].below
    assert rows["category answered"].below
    assert not rows["its rise with wrong pictures"].below
    assert "caption exact match" not in rows


def test_what_is_below_a_baseline_is_marked():
    line = {line[:32].strip(): line for line in comparison.text(SPLITS).splitlines()}
    assert "0.300 <" in line["category answered"]
    assert "<" not in line["text to image R@1, ITC"]
    page = comparison.table(SPLITS)
    assert '<td class="below"><b>0.300</b></td>' in page
    assert '<td class="below"><b>0.500</b></td>' not in page


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 2})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')  # A kill cuts a line short.
    again = MetricsWriter(tmp_path, 2)
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
    page = report.curves([*rows, {"step": 5, "itm_accuracy_negative": None}])
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
    writer.write(5, {"loss": 0.5, "seen": 64, "broken": float("nan"), "name": "nobody"})
    (file,) = (tmp_path / "tensorboard").glob("*tfevents*")
    first, restart, row = read_events(file)
    assert first.file_version == "brain.Event:2"
    assert (restart.step, restart.session_log.status) == (5, restart.session_log.START)
    assert row.step == 5
    assert {value.tag: value.simple_value for value in row.summary.value} == {"loss": 0.5, "seen": 64.0}
    writer.close()


def test_the_pace_leaves_out_what_is_not_training(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("blip2_jax.monitoring.clock.time.perf_counter", lambda: now[0])
    clock = Clock()
    for _ in range(4):
        with clock.measure("train"):
            now[0] += 2
            clock.step()
    with clock.measure("evaluate"):
        now[0] += 100
    pace = clock.pace(batch_size=8, devices=2, steps_left=10)
    assert pace["timing/step_seconds"] == pytest.approx(2)
    assert pace["timing/images_per_second_per_chip"] == pytest.approx(2)
    assert pace["timing/seconds_left"] == pytest.approx(20)
    assert clock.pace(8, 2, 10) == {}


def test_curves_of_every_loss_term():
    rows = [{"step": s, "loss": 1 / s, "loss_itc": 2 / s, "itm_accuracy_positive": 0.5} for s in range(1, 9)]
    page = report.curves(rows)
    assert page.count("<figure") == 3
    assert "NaN" not in page
    assert "nan" not in page
    assert report.chart("empty", {}) == ""
    assert "<svg" in report.chart("one point", {"a": [(1, 2.0)]})


def test_curves_of_evaluations_by_source():
    name = "eval/{}/retrieval/itc/text_to_image/r{}"
    sources = ("nano:val", "jsonl:/some/where.jsonl")
    rows = [{"step": s} | {name.format(src, rank): 0.1 for src in sources for rank in (1, 5, 10)} for s in (10, 20)]
    page = report.evaluation_curves([{"step": 1, "loss": 2.0}, *rows])
    assert page.count("<figure") == 1
    assert all(f"{source} 0.1" in page for source in sources)
    assert report.evaluation_curves(rows[:1]) == ""


def test_attention_shades_what_a_query_does_not_look_at(tmp_path):
    source = tiny.pictures(tmp_path / "pictures")
    lines = (tmp_path / "pictures" / "pictures.jsonl").read_text().splitlines()
    key = json.loads(lines[0])["image"]
    weights = np.array([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]], np.float32)
    page = report.attention(source, [{"key": key, "caption": "a <red> square", "weights": weights}])
    assert page.count("<svg") == 2
    assert page.count('opacity="0.00"') == 5  # The first query's best cell, and all cells of the second.
    assert "&lt;red&gt;" in page
    assert report.attention(source, [{"key": key, "caption": "", "weights": weights[:, :3]}]) == ""


def test_a_page_appears_whole(tmp_path):
    report.write(tmp_path / "report.html", "a & b", "<p>body</p>")
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<h1>a &amp; b</h1><p>body</p>" in page
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
