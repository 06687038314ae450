"""Questions in the layouts of VQAv2, OK-VQA and GQA."""

import json
import pathlib

import pytest

from blip2_jax.data import sources
from blip2_jax.data.records import BadRecord
from tests import sources as tiny


def parts(name):
    return [pathlib.Path(part) for part in name.partition(":")[2].split("+")]


def test_vqa(tmp_path):
    assert sources.open_source(tiny.vqa(tmp_path))[4] == {
        "key": "1004",
        "question": "picture 4?",
        "answers": ["yes", "no", "maybe"],
        "weights": [0.6, 0.3, 0.1],
        "question_type": "what is",
        "answer_type": "other",
        "coco_id": 1,
        "image": tiny.picture(1),
    }


def test_images_in_the_folder_itself(tmp_path):
    name = tiny.vqa(tmp_path)
    assert sources.open_source(f"{name}/train2014")[0]["image"] == tiny.picture(0)


def test_a_test_split_has_no_answers(tmp_path):
    """The questions of test-dev2015 are about images of test2015."""
    questions, _, images = parts(tiny.vqa(tmp_path))
    content = json.loads(questions.read_text()) | {"data_subtype": "test-dev2015"}
    questions.write_text(json.dumps(content))
    tiny.write_images(images / "test2015", [f"COCO_test2015_{number:012d}.jpg" for number in (0, 1)])
    record = sources.open_source(f"vqa:{questions}+{images}")[0]
    assert record == {"key": "1000", "question": "picture 0?", "coco_id": 0, "image": tiny.picture(0)}


def test_questions_without_answers(tmp_path):
    name = tiny.vqa(tmp_path)
    _, annotations, _ = parts(name)
    content = json.loads(annotations.read_text())
    del content["annotations"][2]
    content["annotations"][0]["answers"] = []
    annotations.write_text(json.dumps(content))
    source = sources.open_source(name)
    for index in (0, 2):
        with pytest.raises(BadRecord, match="the question has no answers") as raised:
            source[index]
        assert (raised.value.reason, raised.value.where) == ("caption_missing", f"{1000 + index}")
    assert source[1]["key"] == "1001"


def test_files_of_different_splits(tmp_path):
    name = tiny.vqa(tmp_path)
    _, annotations, _ = parts(name)
    annotations.write_text(annotations.read_text().replace('"question_id": 1', '"question_id": 7'))
    with pytest.raises(ValueError, match=r"no question of .*questions\.json has answers in .*they are of other splits"):
        sources.open_source(name)


def test_files_in_the_wrong_order(tmp_path):
    questions, annotations, images = parts(tiny.vqa(tmp_path))
    with pytest.raises(ValueError, match="the layout is not that of vqa"):
        sources.open_source(f"vqa:{annotations}+{questions}+{images}")


def test_gqa(tmp_path):
    name = tiny.gqa(tmp_path)
    assert sources.open_source(name)[2] == {
        "key": "00000002",
        "question": "picture 2?",
        "answers": ["yes"],
        "weights": [1.0],
        "image": tiny.picture(2),
    }
    file = parts(name)[0]
    content = json.loads(file.read_text())
    del content["00000002"]["answer"]
    file.write_text(json.dumps(content))
    assert "answers" not in sources.open_source(name)[2]


def test_gqa_in_the_layout_of_vqa(tmp_path):
    questions, _, images = parts(tiny.vqa(tmp_path))
    with pytest.raises(ValueError, match=r'expected {ID: {"imageId": \.\.\., "question": \.\.\.}}'):
        sources.open_source(f"gqa:{questions}+{images}")
