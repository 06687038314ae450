"""Captions in the layouts of COCO, Karpathy and BLIP."""

import pytest

from blip2_jax.data import sources
from blip2_jax.data.records import BadRecord
from tests import sources as tiny


def read(name):
    source, found = sources.open_source(name), {}
    for index in range(len(source)):
        try:
            record = source[index]
            found[record["key"]] = record["captions"]
        except BadRecord as problem:
            found[problem.where] = problem.reason
    return found


def test_coco(tmp_path):
    source = sources.open_source(tiny.coco(tmp_path))
    record = source[3]
    assert record == {
        "key": "COCO_train2014_000000000003.jpg",
        "captions": ["picture 3", "colour number 3"],
        "coco_id": 3,
        "image": tiny.picture(3),
    }


@pytest.fixture
def karpathy(tmp_path):
    """Two training images, one of restval, two of val and one of test that is gone."""
    images = [
        tiny.karpathy_image(0, "train", ["one"] * 5),
        tiny.karpathy_image(1, "val", [f"caption {number}" for number in range(7)]),
        tiny.karpathy_image(2, "restval", ["a", ""]),
        tiny.karpathy_image(3, "test", ["gone"], filename="gone.jpg"),
        tiny.karpathy_image(4, "train", []),
        tiny.karpathy_image(5, "val", ["  "]),
    ]
    tiny.write_images(tmp_path, [f"val2014/{image['filename']}" for image in images if image["filename"] != "gone.jpg"])
    return f"coco:{tiny.write_json(tmp_path / 'dataset_coco.json', {'images': images, 'dataset': 'coco'})}+{tmp_path}"


def test_karpathy(karpathy):
    name = "val2014/COCO_val2014_{:012d}.jpg".format
    train = {name(0): ["one"] * 5, name(4): "caption_missing"}
    val = {name(1): [f"caption {number}" for number in range(7)], name(5): "caption_empty"}
    assert read(f"{karpathy}?split=train") == train
    assert read(f"{karpathy}?split=val") == val
    assert read(f"{karpathy}?split=restval,train") == train | {name(2): ["a"]}
    assert len(read(karpathy)) == 6
    record = sources.open_source(karpathy)[1]
    assert record["coco_id"] == 101
    assert set(record) == {"key", "image", "captions", "coco_id"}


def test_flickr30k(tmp_path):
    """Its images lie in one folder, and have no number of COCO."""
    image = {"sentids": [0], "imgid": 0, "sentences": [{"tokens": ["a"], "raw": "A.", "imgid": 0, "sentid": 0}]}
    file = tiny.write_json(
        tmp_path / "dataset_flickr30k.json",
        {"images": [image | {"split": "test", "filename": "1000092795.jpg"}], "dataset": "flickr30k"},
    )
    tiny.write_images(tmp_path / "flickr30k-images", ["1000092795.jpg"])
    record = sources.open_source(f"coco:{file}+{tmp_path}/flickr30k-images?split=test")[0]
    assert record == {"key": "1000092795.jpg", "captions": ["A."], "image": tiny.picture()}


def test_splits_order_and_identity(karpathy):
    first = sources.open_source(f"{karpathy}?split=train,restval")
    assert sources.open_source(f"{karpathy}?split=restval,train").identity == first.identity
    assert sources.open_source(karpathy).identity != first.identity


def test_an_unknown_split_names_the_known(karpathy):
    with pytest.raises(ValueError, match=r"it has no split dev; there are restval, test, train, val"):
        sources.open_source(f"{karpathy}?split=dev,train")


def test_blip(tmp_path):
    """Its lists have a caption a line for training, and all of an image for the tests."""
    tiny.write_images(tmp_path, ["a.jpg", "b.jpg"])
    lines = [
        {"image": "a.jpg", "caption": "a1", "image_id": "coco_1"},
        {"image": "b.jpg", "caption": ["b1", "b2"]},
        {"image": "a.jpg", "caption": "a2", "image_id": "coco_1"},
    ]
    file = tiny.write_json(tmp_path / "coco_karpathy_train.json", lines)
    assert read(f"coco:{file}+{tmp_path}") == {"a.jpg": ["a1", "a2"], "b.jpg": ["b1", "b2"]}
    with pytest.raises(ValueError, match="split=train, but only files in Karpathy's layout name their splits"):
        sources.open_source(f"coco:{file}+{tmp_path}?split=train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"categories": []}, 'has another layout; expected "images" with "annotations"'),
        ("text", "has another layout"),
        ([{"image": "a.jpg"}], r"the layout is not that of coco \(KeyError\('caption'\)\)"),
        (
            {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"bbox": [], "image_id": 1}]},
            "are no captions",
        ),
        ({"images": [{"id": 1}], "annotations": []}, r"the layout is not that of coco \(KeyError\('file_name'\)\)"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}]}, r"the layout is not that of coco \(KeyError\('split'\)\)"),
        ({"images": [], "annotations": []}, "holds no record"),
    ],
)
def test_other_files(tmp_path, content, message):
    file = tiny.write_json(tmp_path / "file.json", content)
    with pytest.raises(ValueError, match=message):
        sources.open_source(f"coco:{file}+{tmp_path}")


def test_no_json(tmp_path):
    (tmp_path / "file.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"file\.json is not a JSON file: Expecting value"):
        sources.open_source(f"coco:{tmp_path}/file.json+{tmp_path}")


def test_the_wrong_folder_of_images(tmp_path):
    annotations = tiny.coco(tmp_path).partition("+")[0]
    with pytest.raises(FileNotFoundError, match=r"of 6 images looked for none is there, the first COCO_train2014_0"):
        sources.open_source(f"{annotations}+{tmp_path}")
