"""Pages: curves, where the time went, evaluations, pictures and where queries look."""

import base64
import io
import itertools
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from blip2_jax.data.sources import open_source
from blip2_jax.monitoring import charts, examples, report
from blip2_jax.monitoring.metrics import MetricsWriter
from blip2_jax.monitoring.pictures import Thumbnails
from tests import tiny


def test_curves_of_every_loss_term():
    rows = [{"step": s, "loss": 1 / s, "loss_itc": 2 / s, "itm_accuracy_positive": 0.5} for s in range(1, 9)]
    page = charts.curves(rows)
    assert page.count("<figure") == 3
    assert "NaN" not in page
    assert "nan" not in page
    assert charts.chart("empty", {}) == ""
    assert "<svg" in charts.chart("one point", {"a": [(1, 2.0)]})


def test_curves_of_evaluations_by_source():
    name = "eval/{}/retrieval/itc/text_to_image/r{}"
    sources = ("nano:val", "jsonl:/some/where.jsonl")
    rows = [{"step": s} | {name.format(src, rank): 0.1 for src in sources for rank in (1, 5, 10)} for s in (10, 20)]
    page = charts.evaluation_curves([{"step": 1, "loss": 2.0}, *rows])
    assert page.count("<figure") == 1
    assert all(f"{source} 0.1" in page for source in sources)
    assert charts.evaluation_curves(rows[:1]) == ""


def test_the_bar_of_time_is_whole():
    bar = charts.time_bar({"train": 60, "data": 20, "compile": 10, "evaluate": 10, "checkpoint": 0, "profile": 0})
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", bar)]
    assert widths == [60, 20, 10, 10]
    assert "checkpoint" not in bar


def test_tokens_are_squares_without_a_class_token():
    assert examples.squares([[255, 0, 0, 9]]).tolist() == [[[255, 0], [0, 9]]]
    assert examples.squares([[7, 255, 0, 0, 9]]).tolist() == [[[255, 0], [0, 9]]]
    assert examples.squares([[1, 2, 3]]).size == 0


@pytest.fixture
def source(tmp_path):
    return tiny.pictures(tmp_path / "pictures")


def keys(source):
    opened = open_source(source)
    return [opened[index]["key"] for index in range(len(opened))]


def test_thumbnails_are_found_by_key(source):
    wanted = [keys(source)[7], keys(source)[2], keys(source)[7]]
    found = Thumbnails(open_source(source)).samples(wanted)
    assert [sample["key"] for sample in found] == sorted(set(wanted))
    assert all(sample["image"].startswith("data:image/webp;base64,") for sample in found)
    with pytest.raises(KeyError, match="no record has the key 'nothing'"):
        Thumbnails(open_source(source)).samples(["nothing"])


def samples_of(source):
    """What evaluations of both stages give, as JSON brings it back."""
    known = keys(source)
    found = {"kind": "text_to_image", "text": "a <red> square"}
    samples = [
        found | {"by": "itc", "found": known[:2], "right": [False, True]},
        found | {"by": "itm", "found": [known[1], known[3]], "right": [True, False]},
        {
            "kind": "image_to_text",
            "by": "itc",
            "key": known[4],
            "text": "a",
            "found": ["a", "b"],
            "right": [True, False],
        },
        {"kind": "image_to_text", "by": "itm", "key": known[9], "text": "a", "found": ["a"], "right": [True]},
        {"kind": "caption", "key": known[5], "text": "a", "generated": "", "answer": "x", "category": "shapes"},
        {"kind": "attention", "stage": "stage1", "key": known[0], "text": "c", "weights": [[255, 0, 0, 51]] * 3},
    ]
    shown = examples.keys_shown(samples)
    assert shown == {known[index] for index in (0, 1, 3, 4, 5)}  # Where ITM finds captions is not shown.
    return json.loads(json.dumps(samples + Thumbnails(open_source(source)).samples(shown)))


def test_a_page_holds_each_picture_once_and_needs_no_source(source, tmp_path):
    samples = samples_of(source)
    html = examples.sections({source: samples})
    assert html.count("data:image/webp") == html.count("background-image") == 5
    assert html.count(f'title="{keys(source)[0]}"') == 5  # ITC's first, and a picture with its three maps.
    assert html.count("data:image/png;base64") == 3
    assert "&lt;red&gt;" in html
    assert "<red>" not in html
    assert html.index("with ITM") > html.index("something else came first (1 of 1)")
    assert "(nothing)" in html
    assert "found at once (0 of 1)" in html
    assert "background-image" not in examples.sections({source: samples[:1]})  # Without pictures there are boxes.


def test_what_is_shown_is_evenly_spread_and_nothing_twice():
    captions = [{"kind": "caption", "key": str(number)} for number in range(100)]
    shown = sorted(map(int, examples.keys_shown(captions)))
    assert (len(shown), shown[0], shown[-1]) == (24, 0, 99)
    assert {later - sooner for sooner, later in itertools.pairwise(shown)} == {4, 5}
    assert examples.keys_shown(captions[:3]) == {"0", "1", "2"}


def test_the_page_of_a_run_is_made_of_its_workdir_alone(source, tmp_path):
    workdir = tmp_path / "run"
    (workdir / "samples").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps({"task": "stage1", "total_steps": 40}))
    writer = MetricsWriter(workdir, 0)
    for step in range(1, 41):
        row = {"loss": 1 / step, "timing/train_seconds": 2.0 * step, "timing/data_seconds": 1.0, "timing/mfu": 0.25}
        if step % 4 == 0:
            row |= {f"eval/{source}/retrieval/itc/text_to_image/r1": step / 100, f"eval/{source}/loss_itc": 1.5}
            (workdir / "samples" / f"{step}.json").write_text(json.dumps({source: samples_of(source)}))
        writer.write(step, row)
    writer.close()
    for file in (tmp_path / "pictures").iterdir():
        file.unlink()
    report.write_run(workdir)
    page = (workdir / "report.html").read_text()
    for text in ("No alarm at step 40", "Where the time went", "1:21", "25.0%", "Examples at step 40", "40 of 40"):
        assert text in page
    # The first and the newest of ten evaluations.
    assert re.findall(r"<th>step (\d+)</th>", page) == ["4", "16", "20", "24", "28", "32", "36", "40"]
    assert "<td>0.400</td>" in page
    assert not re.findall(r'(?:src|href)="(?!data:)|url\((?!data:)', page)


def test_the_pages_of_real_runs(stage1, stage2, tmp_path):
    """Both stages, and again from a copy of the workdir alone."""
    for workdir, sections in (
        (
            stage1,
            (
                "<b>itc at chance</b> since step 4",
                "Pictures of a caption",
                "with ITM",
                "Captions of a picture",
                "<h4>stage1</h4>",
            ),
        ),
        (stage2, ("Captions written for", "<h4>stage2</h4>")),
    ):
        page = (workdir / "report.html").read_text()
        for text in (*sections, "Where the queries look", "Where the time went", "loss", "compile", "Evaluations"):
            assert text in page
        numbers = {int(number) for number in re.findall(r'class="picture p(\d+) ', page)}
        assert numbers == {int(number) for number in re.findall(r"\.p(\d+)\{background-image", page)} != set()
        copied = tmp_path / workdir.name
        for name in ("config.json", "metrics.jsonl", "samples"):
            copy = shutil.copytree if (workdir / name).is_dir() else shutil.copy
            copied.mkdir(exist_ok=True)
            copy(workdir / name, copied / name)
        report.write_run(copied)
        assert (copied / "report.html").read_text() == page


def test_a_run_without_a_row_has_a_page(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"task": "stage2", "total_steps": 4}))
    report.write_run(tmp_path)
    assert "<h1>stage2 in " in (tmp_path / "report.html").read_text()


def test_a_page_appears_whole(tmp_path):
    report.write(tmp_path / "report.html", "a & b", "<p>body</p>")
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<h1>a &amp; b</h1><p>body</p>" in page
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_maps_are_bright_where_a_query_looks():
    html = examples._shade(np.array([[255, 0], [51, 255]], np.uint8))
    encoded = re.search(r"base64,([^\"]+)", html)[1]
    alpha = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))[..., 3]
    assert alpha.tolist() == [[0, 217], [173, 0]]
