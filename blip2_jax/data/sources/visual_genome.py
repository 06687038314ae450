"""Visual Genome, in its published JSON: phrases about regions as captions, or questions and answers."""

from __future__ import annotations

import pathlib
from typing import Any

from blip2_jax.data.sources.annotated import AnnotatedImages, Parsed, captioned, open_annotated, read_json
from blip2_jax.data.sources.content import answers_of
from blip2_jax.data.sources.names import split_files


def open_visual_genome(what: str) -> AnnotatedImages:
    """vg:region_descriptions.json+IMAGES or vg:question_answers.json+IMAGES.

    A record of regions is an image with all its phrases as captions; its key is the image's id. A record of questions
    is a question; its key is the question's id. IMAGES is the folder of 1.jpg, or the one of VG_100K and VG_100K_2.

    Args:
      what: behind "vg:".
    """
    annotations, images = split_files("vg", what, "REGIONS_OR_QUESTIONS.json", "IMAGES")
    folders = [images, *(images / name for name in ("VG_100K", "VG_100K_2") if (images / name).is_dir())]
    where = f"vg:{what}"
    return open_annotated([annotations], folders, ["vg"], lambda: _records(annotations, where), where)


def _records(file: pathlib.Path, where: str) -> Parsed:
    for image in read_json(file, _slim):
        number = image["image_id"] if "image_id" in image else image["id"]  # Versions 1.0 and 1.2.
        name = f"{number}.jpg"
        if "regions" in image:
            yield captioned(str(number), name, image["regions"])
        elif "qas" in image:
            for key, question, answer in image["qas"]:
                yield {"key": str(key), "file": name, "question": question, **answers_of([answer])}
        else:
            raise ValueError(f'{where}: expected "regions" or "qas" of each image, found {", ".join(image)}')


def _slim(item: dict) -> Any:
    """Of five million regions only the phrases, of questions only what is asked and answered."""
    if "phrase" in item:
        return item["phrase"]
    if "qa_id" in item:
        return item["qa_id"], item["question"], item["answer"]
    return item
