"""Captions in JSON: COCO's own, as NoCaps has too, Karpathy's splits of COCO and Flickr30k, and BLIP's lists."""

from __future__ import annotations

import pathlib
from typing import Any

from blip2_jax.data.sources.annotated import AnnotatedImages, Parsed, captioned, open_annotated, read_json
from blip2_jax.data.sources.names import split_files

_EXPECTED = (
    'expected "images" with "annotations" (COCO, NoCaps), "images" with "sentences" (Karpathy), or a list of "image" '
    'with "caption" (BLIP, LAVIS)'
)


def open_coco(what: str, *, split: str = "") -> AnnotatedImages:
    """coco:ANNOTATIONS.json+IMAGES: a record an image, with all its captions; its key is the file's name in IMAGES.

    Args:
      what: behind "coco:".
      split: of a Karpathy file, such as "train,restval"; all by default.
    """
    annotations, images = split_files("coco", what, "ANNOTATIONS.json", "IMAGES")
    where = f"coco:{what}"
    splits = sorted(split.split(",")) if split else []
    parse = lambda: _records(annotations, splits, where)
    return open_annotated([annotations], [images], ["coco", *splits], parse, where)


def _records(file: pathlib.Path, splits: list[str], where: str) -> Parsed:
    content = read_json(file, _slim)
    if isinstance(content, dict) and "images" in content and "annotations" not in content:
        return _karpathy(content["images"], splits, where)
    if splits:
        raise ValueError(f"{where}: split={','.join(splits)}, but only files in Karpathy's layout name their splits")
    if isinstance(content, dict) and "images" in content:
        return _coco(content["images"], content["annotations"], where)
    if isinstance(content, list):
        return _listed(content)
    raise ValueError(f"{where}: {file} has another layout; {_EXPECTED}")


def _slim(item: dict) -> Any:
    """Leaves of a sentence, or of COCO's annotation, what is needed: a Karpathy file's tokens would take a gigabyte."""
    if "raw" in item:
        return item["raw"]
    if "caption" in item and "image" not in item:
        return item["image_id"], item["caption"]
    return item


def _coco(images: list, annotations: list, where: str) -> Parsed:
    captions: dict[Any, list] = {image["id"]: [] for image in images}
    for annotation in annotations:
        if isinstance(annotation, dict):
            raise ValueError(f"{where}: its annotations are no captions; expected a file as captions_train2014.json")
        captions[annotation[0]].append(annotation[1])
    for image in images:
        yield captioned(image["file_name"], image["file_name"], captions[image["id"]], coco_id=image["id"])


def _karpathy(images: list, splits: list[str], where: str) -> Parsed:
    known = sorted({image["split"] for image in images})
    if unknown := set(splits) - set(known):
        raise ValueError(f"{where}: it has no split {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for image in images:
        if not splits or image["split"] in splits:
            file = str(pathlib.PurePosixPath(image.get("filepath", "")) / image["filename"])
            rest = {"coco_id": image["cocoid"]} if "cocoid" in image else {}
            yield captioned(file, file, image["sentences"], **rest)


def _listed(items: list) -> Parsed:
    captions: dict[str, list] = {}
    for item in items:
        found = item["caption"]
        captions.setdefault(item["image"], []).extend(found if isinstance(found, list) else [found])
    for file, found in captions.items():
        yield captioned(file, file, found)
