"""Data that TFDS has prepared."""

import os
import subprocess
import sys

import pytest

from blip2_jax.data import sources
from blip2_jax.data.records import BadRecord
from tests import sources as tiny


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return tiny.tfds_coco(tmp_path_factory.mktemp("tfds"))


def test_the_layout_of_coco_captions(coco):
    source = sources.open_source(coco)
    record = next(record for record in map(source.__getitem__, range(6)) if record["captions"][0] == "picture 3")
    assert record["captions"] == ["picture 3", "colour number 3"]
    assert record["image"] == tiny.picture(3), "images must stay encoded as they are"
    assert record["key"].startswith("train/")


def test_no_tensorflow(coco, tmp_path):
    """The data set's own script would import it; neither that nor anything else does, where it is installed."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('TensorFlow was imported')")
    script = f"from blip2_jax.data.sources import open_source; print(open_source({coco!r})[0]['captions'])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "picture" in ended.stdout


def test_splits(coco):
    name = coco.partition("?")[0]
    directory = coco.rpartition("=")[2]
    read = lambda split: sources.open_source(f"{name}?split={split}&data_dir={directory}")
    assert len(read("val")) == 2
    assert len(read("train+val")) == 8
    part = read("train[2:4]")
    whole = read("train")
    assert [part[index]["captions"] for index in range(2)] == [whole[index]["captions"] for index in (2, 3)]
    assert len({read(split).identity for split in ("train", "val", "train[:3]", "train[3:]")}) == 4
    with pytest.raises(ValueError, match=r"name a split with \?split=NAME; there are train, val"):
        sources.open_source(f"{name}?data_dir={directory}")
    with pytest.raises(ValueError, match=r"split=test: Unknown split 'test'\. Should be one of \['train', 'val'\]"):
        read("test")


def test_features(coco):
    assert sources.open_source(f"{coco}&text=captions/text")[0]["captions"][0].startswith("picture")
    assert sources.open_source(f"{coco}&text=image/filename")[0]["captions"][0].endswith(".jpg")
    with pytest.raises(
        ValueError, match=r"expected the feature text of texts; .*can be: .*image/filename.*; there are "
    ):
        sources.open_source(f"{coco}&text=text")
    with pytest.raises(ValueError, match=r"expected the feature captions of images; .*can be: image; there are "):
        sources.open_source(f"{coco}&image=captions")


def test_data_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        sources.open_source(f"tfds:coco_captions/2014?split=train&data_dir={tmp_path}")
    command = f"tfds build coco_captions/2014 --file_format=array_record --data_dir={tmp_path}"
    assert command in str(raised.value)


def test_a_file_that_is_gone(tmp_path):
    name = tiny.tfds_coco(tmp_path)
    (file,) = tmp_path.rglob("*train.array_record*")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 files are not there, such as .*train\.array_record-00000"):
        sources.open_source(name)


def test_captions_flat_and_missing(tmp_path):
    """Another layout: a text for each image, here of none of the usual names."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class Flat(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            code_path = None

            def _info(self):
                features = {"picture": tfds.features.Image(), "sentence": tfds.features.Text()}
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for number, text in enumerate(("fine", " ", b"caf\xe9")):
                    path = tmp_path / f"{number}.jpg"
                    path.write_bytes(tiny.picture())
                    yield number, {"picture": path, "sentence": text}

        Flat(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source, found = sources.open_source(f"tfds:flat?data_dir={tmp_path}"), []
    for index in range(len(source)):
        try:
            found.append(source[index]["captions"][0])
        except BadRecord as problem:
            found.append(problem.reason)
    assert sorted(found) == ["caption_empty", "caption_not_utf8", "fine"]
