"""Tiny corpora in the true format of every kind of source: each function writes one and returns the source's name."""

from __future__ import annotations

import io
import json
import pathlib
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgpack
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from blip2_jax.data import shards

COUNT = 6  # Records.


def picture(number: int = 0, size: tuple[int, int] = (20, 10), kind: str = "JPEG") -> bytes:
    """An encoded image of a colour of its own."""
    stream = io.BytesIO()
    Image.new("RGB", size, (40 * number % 256, 90, 160)).save(stream, kind)
    return stream.getvalue()


def captions(number: int) -> list[str]:
    return [f"picture {number}", f"colour number {number}"]


def write_images(folder: pathlib.Path, names: Iterable[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))


def write_json(file: pathlib.Path, content: Any) -> pathlib.Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def write_lines(file: pathlib.Path, items: Iterable[Any]) -> pathlib.Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    return file


def write_tar(file: pathlib.Path, members: Mapping[str, bytes], form: int = tarfile.DEFAULT_FORMAT) -> pathlib.Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", format=form) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


def arrayrecord(root: pathlib.Path) -> str:
    for number in range(2):
        rows = shards.shard_range(COUNT, number, 2)
        records = [{"key": f"{row}", "image": picture(row), "captions": captions(row)} for row in rows]
        shards.write_shard(shards.shard_file(root, number, 2), map(msgpack.packb, records))
    return f"arrayrecord:{root}/*.arrayrecord"


def folder(root: pathlib.Path) -> str:
    names = [f"{'cats' if number % 2 else 'dogs'}/{number}.jpg" for number in range(COUNT)]
    write_images(root, names)
    for number, name in enumerate(names):
        (root / name).with_suffix(".txt").write_text(captions(number)[0] + "\n")
    return f"folder:{root}"


def metadata(root: pathlib.Path) -> str:
    """As Hugging Face's imagefolder."""
    write_images(root / "train", [f"{number}.jpg" for number in range(COUNT)])
    lines = [{"file_name": f"{number}.jpg", "text": captions(number)[0]} for number in range(COUNT)]
    write_lines(root / "train" / "metadata.jsonl", lines)
    return f"folder:{root}"


def jsonl(root: pathlib.Path) -> str:
    names = [f"images/{number}.jpg" for number in range(COUNT)]
    write_images(root, names)
    lines = [{"image": name, "caption": captions(number)} for number, name in enumerate(names)]
    return f"jsonl:{write_lines(root / 'data.jsonl', lines)}"


def webdataset(root: pathlib.Path) -> str:
    """As img2dataset writes it."""
    for shard in range(2):
        members = {}
        for number in shards.shard_range(COUNT, shard, 2):
            key, caption = f"{shard:05d}{number:04d}", captions(number)[0]
            about = {"caption": caption, "url": f"http://images/{number}", "key": key, "status": "success"}
            members |= {f"{key}.jpg": picture(number), f"{key}.json": json.dumps(about).encode()}
            members |= {f"{key}.txt": caption.encode()}
        write_tar(root / f"{shard:05d}.tar", members)
    return f"webdataset:{root}/{{00000..00001}}.tar"


def parquet(root: pathlib.Path) -> str:
    """As the hub has image data sets: two files of a split, in small row groups."""
    for file in range(2):
        rows = shards.shard_range(COUNT, file, 2)
        images = [{"bytes": picture(row), "path": f"{row}.jpg"} for row in rows]
        table = pa.table({"image": images, "caption": [captions(row) for row in rows]})
        target = root / "data" / f"train-{file:05d}-of-00002.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, target, row_group_size=2)
    return f"hf:{root}?split=train"


def tfds_coco(root: pathlib.Path) -> str:
    """In the layout of coco_captions, whose own script needs TensorFlow; preparing it does not."""
    import numpy as np
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class CocoCaptions(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.1.0")
            BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="2014"),)
            code_path = None  # To look for it TFDS needs a package that it does not install.

            def _info(self):
                sentences = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
                features = {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "image/filename": tfds.features.Text(),
                    "image/id": np.int64,
                    "captions": sentences,
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

            def _split_generators(self, manager):
                return {"train": self._generate_examples(COUNT), "val": self._generate_examples(2)}

            def _generate_examples(self, count):
                for number in range(count):
                    yield (
                        number,
                        {
                            "image": io.BytesIO(picture(number)),
                            "image/filename": f"{number}.jpg",
                            "image/id": number,
                            "captions": [{"id": 0, "text": text} for text in captions(number)],
                        },
                    )

        builder = CocoCaptions(data_dir=root, config="2014", file_format="array_record")
        builder.download_and_prepare()
    return f"tfds:coco_captions/2014?split=train&data_dir={root}"


def coco(root: pathlib.Path) -> str:
    names = [f"COCO_train2014_{number:012d}.jpg" for number in range(COUNT)]
    write_images(root / "train2014", names)
    images = [{"id": number, "file_name": name, "height": 10, "width": 20} for number, name in enumerate(names)]
    annotations = [
        {"image_id": number, "id": 10 * number + place, "caption": caption}
        for place in range(2)
        for number in range(COUNT)
        for caption in [captions(number)[place]]
    ]
    file = write_json(root / "captions_train2014.json", {"info": {}, "images": images, "annotations": annotations})
    return f"coco:{file}+{root / 'train2014'}"


def karpathy_image(number: int, split: str, sentences: Sequence[str], **fields: Any) -> dict:
    """An image of dataset_coco.json."""
    listed = [
        {"tokens": text.split(), "raw": text, "imgid": number, "sentid": 5 * number + place}
        for place, text in enumerate(sentences)
    ]
    name = f"COCO_val2014_{number:012d}.jpg"
    about = {"filepath": "val2014", "filename": name, "imgid": number, "split": split, "cocoid": 100 + number}
    return about | {"sentids": [sentence["sentid"] for sentence in listed], "sentences": listed} | fields


def karpathy(root: pathlib.Path) -> str:
    splits = ("train", "restval", "train", "train", "restval", "train", "test")
    images = [karpathy_image(number, split, captions(number)) for number, split in enumerate(splits)]
    write_images(root / "images", [f"val2014/{image['filename']}" for image in images])
    file = write_json(root / "dataset_coco.json", {"images": images, "dataset": "coco"})
    return f"coco:{file}+{root / 'images'}?split=train,restval"


def vqa(root: pathlib.Path) -> str:
    """Of VQAv2: three questions about each of two images."""
    write_images(root / "images" / "train2014", [f"COCO_train2014_{number:012d}.jpg" for number in (0, 1)])
    questions, annotations = [], []
    for number in range(COUNT):
        key = 1000 + number
        questions.append({"image_id": number // 3, "question": f"{captions(number)[0]}?", "question_id": key})
        given = ["yes"] * 6 + ["no"] * 3 + ["maybe"]
        answers = [
            {"answer": text, "answer_confidence": "yes", "answer_id": place}
            for place, text in enumerate(given, start=1)
        ]
        about = {"question_type": "what is", "answer_type": "other", "multiple_choice_answer": "yes"}
        annotations.append(about | {"answers": answers, "image_id": number // 3, "question_id": key})
    about = {"info": {}, "license": {}, "data_subtype": "train2014"}
    first = write_json(root / "questions.json", about | {"task_type": "Open-Ended", "questions": questions})
    second = write_json(root / "annotations.json", about | {"annotations": annotations})
    return f"vqa:{first}+{second}+{root / 'images'}"


def gqa(root: pathlib.Path) -> str:
    write_images(root / "images", [f"n{number}.jpg" for number in range(COUNT)])
    questions = {
        f"{number:08d}": {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "cat (1)"}],
            "annotations": {"question": {"3": "1"}, "answer": {}, "fullAnswer": {}},
            "question": f"{captions(number)[0]}?",
            "imageId": f"n{number}",
            "answer": "yes",
            "fullAnswer": "Yes, it is.",
            "isBalanced": True,
        }
        for number in range(COUNT)
    }
    return f"gqa:{write_json(root / 'train_balanced_questions.json', questions)}+{root / 'images'}"


def regions(root: pathlib.Path) -> str:
    """Visual Genome's phrases, of images in both of its folders."""
    write_images(root, [f"{'VG_100K_2' if number % 2 else 'VG_100K'}/{number}.jpg" for number in range(COUNT)])
    box = {"x": 0, "y": 0, "width": 5, "height": 5}
    images = [
        {
            "id": number,
            "regions": [
                {"region_id": 10 * number + place, "image_id": number, "phrase": phrase, **box}
                for place, phrase in enumerate(captions(number))
            ],
        }
        for number in range(COUNT)
    ]
    return f"vg:{write_json(root / 'region_descriptions.json', images)}+{root}"


def questions(root: pathlib.Path) -> str:
    """Visual Genome's questions, three about each of two images."""
    write_images(root / "images", [f"{number}.jpg" for number in (0, 1)])
    images = [
        {
            "id": image,
            "qas": [
                {
                    "qa_id": 10 * image + place,
                    "image_id": image,
                    "question": f"{captions(place)[0]}?",
                    "answer": "Yes.",
                    "a_objects": [],
                    "q_objects": [],
                }
                for place in range(3)
            ],
        }
        for image in (0, 1)
    ]
    return f"vg:{write_json(root / 'question_answers.json', images)}+{root / 'images'}"


# By a name for people; each makes COUNT records.
MAKERS: dict[str, Callable[[pathlib.Path], str]] = {
    "arrayrecord": arrayrecord,
    "folder": folder,
    "metadata": metadata,
    "jsonl": jsonl,
    "webdataset": webdataset,
    "hf": parquet,
    "tfds": tfds_coco,
    "coco": coco,
    "karpathy": karpathy,
    "vqa": vqa,
    "gqa": gqa,
    "vg_regions": regions,
    "vg_questions": questions,
}
