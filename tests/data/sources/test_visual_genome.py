"""Visual Genome's phrases and questions."""

import json
import pathlib

import pytest

from blip2_jax.data import sources
from blip2_jax.data.records import BadRecord
from tests import sources as tiny


def test_phrases_of_an_image_are_its_captions(tmp_path):
    source = sources.open_source(tiny.regions(tmp_path))
    assert source[3] == {"key": "3", "captions": ["picture 3", "colour number 3"], "image": tiny.picture(3)}


def test_version_1_0_and_images_without_phrases(tmp_path):
    name = tiny.regions(tmp_path)
    file = pathlib.Path(name.partition(":")[2].partition("+")[0])
    content = [{"image_id": image["id"], "regions": image["regions"]} for image in json.loads(file.read_text())]
    content[1]["regions"] = []
    file.write_text(json.dumps(content))
    source = sources.open_source(name)
    assert source[0]["key"] == "0"
    with pytest.raises(BadRecord, match="1: the list of captions is empty") as raised:
        source[1]
    assert raised.value.reason == "caption_missing"


def test_questions(tmp_path):
    assert sources.open_source(tiny.questions(tmp_path))[4] == {
        "key": "11",
        "question": "picture 1?",
        "answers": ["Yes."],
        "weights": [1.0],
        "image": tiny.picture(1),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"id": 1, "objects": []}], 'expected "regions" or "qas" of each image, found id, objects'),
        ({"images": []}, "the layout is not that of vg"),
        ([], "holds no record"),
    ],
)
def test_other_files(tmp_path, content, message):
    file = tiny.write_json(tmp_path / "objects.json", content)
    with pytest.raises(ValueError, match=message):
        sources.open_source(f"vg:{file}+{tmp_path}")
