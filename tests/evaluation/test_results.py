"""Result files: the servers' formats, what stands beside them, and that they are written whole."""

import json

import numpy as np
import pytest

from blip2_jax.evaluation import captioning, results, visdial

CHECKPOINT = {"path": "runs/s2", "trained": "ab12", "vision": "cd34", "llm": "ef56"}


@pytest.mark.parametrize(
    ("benchmark", "ids", "outputs", "expected"),
    [
        ("coco", [391895, "522418"], ["a man", "a cake"], [{"image_id": 391895, "caption": "a man"}]),
        ("nocaps", ["0"], ["a dog"], [{"image_id": 0, "caption": "a dog"}]),
        ("vqav2", ["262148000"], ["yes"], [{"question_id": 262148000, "answer": "yes"}]),
        ("okvqa", [np.int64(5)], [""], [{"question_id": 5, "answer": ""}]),
        ("gqa", ["201307251", 7], ["no", "red"], [{"questionId": "201307251", "prediction": "no"}]),
        ("visdial", [(185565, 1)], [np.array([2, 3, 1])], [{"image_id": 185565, "round_id": 1, "ranks": [2, 3, 1]}]),
    ],
)
def test_what_the_servers_accept(benchmark, ids, outputs, expected):
    rows = results.rows(benchmark, ids, outputs)
    assert rows[0] == expected[0] and len(rows) == len(ids)
    assert json.loads(json.dumps(rows)) == rows  # No numbers of numpy's.


def test_visdial_takes_ranks_of_scores():
    scores = np.array([[0.1, 0.7, 0.2]])
    assert results.rows("visdial", [("3", "10")], visdial.ranks(scores)) == [
        {"image_id": 3, "round_id": 10, "ranks": [3, 1, 2]}
    ]


@pytest.mark.parametrize(
    ("benchmark", "ids", "outputs", "message"),
    [
        ("flickr", [], [], "no benchmark 'flickr'; there are coco, nocaps"),
        ("coco", [1, 2], ["a"], "2 ids and 1 predictions"),
        ("coco", [1, "1"], ["a", "b"], r"coco: image_id \(1,\) has two predictions"),
        ("vqav2", ["COCO_1"], ["a"], "question_id 'COCO_1' is no int"),
        ("vqav2", [1], [2], r"answer of \(1,\) is 2: expected a text"),
        ("visdial", [(1, 1)], [[1, 1, 3]], "expected each number from 1 on once"),
        ("visdial", [(1, 1)], [[0, 1, 2]], "expected each number from 1 on once"),
    ],
)
def test_what_they_would_not_accept(benchmark, ids, outputs, message):
    with pytest.raises(ValueError, match=message):
        results.rows(benchmark, ids, outputs)


def written(folder, metrics, **more):
    rows = results.rows("coco", [1, 2], ["a café", "a dog"])
    settings, prompts = {"decoder": "beam", "beams": 5, "source": "coco:x.json+images"}, {"caption": "a photo of"}
    return results.write(
        folder,
        "coco_test",
        "coco",
        rows,
        metrics=metrics,
        settings=settings,
        prompts=prompts,
        checkpoint=CHECKPOINT,
        **more,
    )


def test_files_side_by_side(tmp_path):
    metrics = captioning.score(["a café", "a dog"], [["a café"], ["a cat"]])
    submission, details = written(tmp_path / "results", metrics)
    assert sorted(file.name for file in (tmp_path / "results").iterdir()) == [
        "coco_test.details.json",
        "coco_test.json",
    ]
    assert json.loads(submission.read_text()) == [
        {"image_id": 1, "caption": "a café"},
        {"image_id": 2, "caption": "a dog"},
    ]
    found = json.loads(details.read_text())
    assert found["predictions"] == json.loads(submission.read_text())
    assert found["metrics"] == metrics
    assert found["settings"]["beams"] == 5 and found["prompts"] == {"caption": "a photo of"}
    assert found["checkpoint"] == CHECKPOINT
    assert {"blip2_jax", "captioning", "tokens", "vqa", "visdial"} <= set(found["versions"])


def test_metrics_that_are_not_there_are_named(tmp_path):
    _, details = written(tmp_path, {"cider": 1.0})
    assert set(json.loads(details.read_text())["absent"]) == {"meteor", "spice"}
    _, details = written(tmp_path, {"cider": 1.0, "meteor": 0.3}, absent={"spice": "no java"})
    assert json.loads(details.read_text())["absent"] == {"spice": "no java"}
    _, details = written(tmp_path, {"cider": 1.0, "meteor": 0.3, "spice": 0.2})
    assert json.loads(details.read_text())["absent"] == {}


def test_no_file_where_a_number_is_none(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        written(tmp_path, {"cider": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_an_older_result_stays_where_writing_fails(tmp_path, monkeypatch):
    written(tmp_path, {"cider": 1.0})
    before = {file: file.read_text() for file in tmp_path.iterdir()}

    def full(self, *arguments, **more):
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path, {"cider": 2.0})
    monkeypatch.undo()
    assert {file: file.read_text() for file in tmp_path.iterdir()} == before
