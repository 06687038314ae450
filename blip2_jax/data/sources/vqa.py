"""Questions about images, in the JSON of VQAv2, OK-VQA and GQA."""

from __future__ import annotations

import pathlib
import re
import sys
from typing import Any

from blip2_jax.data.records import BadRecord
from blip2_jax.data.sources.annotated import AnnotatedImages, Parsed, open_annotated, read_json
from blip2_jax.data.sources.content import answers_of
from blip2_jax.data.sources.names import split_files


def open_vqa(what: str) -> AnnotatedImages:
    """vqa:QUESTIONS.json+ANNOTATIONS.json+IMAGES, of VQAv2 or OK-VQA: a record a question, with its id as key.

    Each of the ten answers weighs a tenth, equal ones together. vqa:QUESTIONS.json+IMAGES, of a test split, has no
    answers. IMAGES is the folder of COCO_train2014_000000000009.jpg, or the one of train2014.

    Args:
      what: behind "vqa:".
    """
    expected = ["QUESTIONS.json", "ANNOTATIONS.json", "IMAGES"]
    if what.count(".json+") == 1:
        expected.remove("ANNOTATIONS.json")
    *files, images = split_files("vqa", what, *expected)
    where = f"vqa:{what}"
    folders = [
        images,
        *sorted(folder for folder in images.iterdir() if re.fullmatch(r"(train|val|test)\d+", folder.name)),
    ]
    return open_annotated(files, folders, ["vqa"], lambda: _questions(files, where), where)


def _questions(files: list[pathlib.Path], where: str) -> Parsed:
    content = read_json(files[0], lambda item: item)
    annotations = {}
    if len(files) == 2:
        found = read_json(files[1], _slim)["annotations"]
        annotations = {annotation["question_id"]: annotation for annotation in found}
        if not any(question["question_id"] in annotations for question in content["questions"]):
            raise ValueError(f"{where}: no question of {files[0]} has answers in {files[1]}: they are of other splits")
    # The questions of test-dev2015 are about images of test2015.
    subtype = content["data_subtype"].replace("-dev", "")
    for question in content["questions"]:
        key = str(question["question_id"])
        record = {
            "key": key,
            "file": f"COCO_{subtype}_{question['image_id']:012d}.jpg",
            "question": question["question"],
            "coco_id": question["image_id"],
        }
        if len(files) == 1:
            yield record
        elif (annotation := annotations.get(question["question_id"])) and annotation["answers"]:
            kinds = {name: annotation[name] for name in ("question_type", "answer_type") if name in annotation}
            yield record | kinds | answers_of(annotation["answers"])
        else:
            yield BadRecord("caption_missing", key, f"the question has no answers in {files[1]}")


def _slim(item: dict) -> Any:
    """Of one of the ten answers only its text, which a million questions share."""
    return sys.intern(item["answer"]) if "answer_id" in item else item


def open_gqa(what: str) -> AnnotatedImages:
    """gqa:QUESTIONS.json+IMAGES: a record a question; its key is the question's id, its image IMAGES/IMAGEID.jpg.

    The questions of the submission split have no answers.

    Args:
      what: behind "gqa:".
    """
    questions, images = split_files("gqa", what, "QUESTIONS.json", "IMAGES")
    where = f"gqa:{what}"
    return open_annotated([questions], [images], ["gqa"], lambda: _gqa_questions(questions, where), where)


def _gqa_questions(file: pathlib.Path, where: str) -> Parsed:
    for key, value in read_json(file, _slim_gqa).items():
        if not isinstance(value, tuple):
            raise ValueError(f'{where}: expected {{ID: {{"imageId": ..., "question": ...}}}}, found {str(value)[:80]}')
        image, question, answer = value
        answers = {} if answer is None else answers_of([answer])
        yield {"key": key, "file": f"{image}.jpg", "question": question, **answers}


def _slim_gqa(item: dict) -> Any:
    """Without the programs and scene graphs that come with a question."""
    if "imageId" in item:
        return item["imageId"], item["question"], item.get("answer")
    return item
