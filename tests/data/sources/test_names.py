"""Names of sources, parts of names, and patterns of shards."""

import pytest

from blip2_jax.data import sources
from blip2_jax.data.sources import names


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("nano:train", ("nano", "train", {})),
        ("coco:a.json+images?split=train,val", ("coco", "a.json+images", {"split": "train,val"})),
        (
            "tfds:a/b:1.0.0?split=train[:10%25]&data_dir=d",
            ("tfds", "a/b:1.0.0", {"split": "train[:10%]", "data_dir": "d"}),
        ),
        ("webdataset:0000?.tar?text=alt%20text", ("webdataset", "0000?.tar", {"text": "alt text"})),
        ("webdataset:gs://bucket/{00..11}.tar", ("webdataset", "gs://bucket/{00..11}.tar", {})),
        ("hf:data?split=train-0000?", ("hf", "data", {"split": "train-0000?"})),
    ],
)
def test_parse(name, parsed):
    assert names.parse(name) == parsed


@pytest.mark.parametrize("name", ["", "coco", "nano:", ":train", "hf:x?split=", "hf:x?a=1&a=2", "hf:x?a=1&b"])
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match=r"data source .*expected KIND:WHAT|expected \?OPTION=VALUE"):
        names.parse(name)


def test_an_unknown_kind_names_the_known():
    with pytest.raises(ValueError, match=r"there is no kind 'ftp'; there are nano, arrayrecord, folder, jsonl, webd"):
        sources.open_source("ftp:x")


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("{7..7}", ["7"]),
        ("x{,.gz}", ["x", "x.gz"]),
    ],
)
def test_braces(pattern, expanded):
    assert names.expand_braces(pattern) == expanded


@pytest.mark.parametrize("pattern", ["{5..2}.tar", "{a}.tar", "{}.tar"])
def test_bad_braces(pattern):
    with pytest.raises(ValueError, match=r"expected \{FIRST\.\.LAST\}"):
        names.expand_braces(pattern)


def test_files_of_a_name(tmp_path):
    (tmp_path / "c++ images").mkdir()
    (tmp_path / "a.json").write_text("{}")
    what = f"{tmp_path}/a.json+{tmp_path}/c++ images"
    found = names.split_files("coco", what, "ANNOTATIONS.json", "IMAGES")
    assert found == [tmp_path / "a.json", tmp_path / "c++ images"]
    with pytest.raises(ValueError, match=r"expected coco:ANNOTATIONS\.json\+IMAGES, found 1 of these parts"):
        names.split_files("coco", f"{tmp_path}/a.json", "ANNOTATIONS.json", "IMAGES")
    with pytest.raises(FileNotFoundError, match=r"b\.json is no file; expected ANNOTATIONS\.json"):
        names.split_files("coco", f"{tmp_path}/b.json+{tmp_path}", "ANNOTATIONS.json", "IMAGES")
    with pytest.raises(FileNotFoundError, match="pictures is no folder; expected the images there"):
        names.split_files("coco", f"{tmp_path}/a.json+pictures", "ANNOTATIONS.json", "IMAGES")
