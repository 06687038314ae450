"""Where records come from. A source is named by one string, KIND:WHAT?OPTION=VALUE&OPTION=VALUE, and read by index.

nano:SPLIT                       the pictures that ship with the package
arrayrecord:GLOB                 what `python -m blip2_jax.data prepare` writes
folder:DIR                       images with a text file beside each, or with a metadata.jsonl
jsonl:FILE                       lines {"image": PATH, "caption": TEXT}
webdataset:GLOB                  tar shards, as of img2dataset, also remote: webdataset:gs://bucket/{00000..00331}.tar
hf:DIR                           parquet files with images in them
tfds:NAME                        what TFDS has prepared: tfds:coco_captions/2014?split=train
coco:ANNOTATIONS.json+IMAGES     COCO, NoCaps, and Karpathy's splits: coco:dataset_coco.json+images?split=train,restval
vqa:QUESTIONS.json+ANNOTATIONS.json+IMAGES      VQAv2, OK-VQA
gqa:QUESTIONS.json+IMAGES
vg:ANNOTATIONS.json+IMAGES       Visual Genome's region_descriptions.json or question_answers.json

What is wrong with a source as a whole is an error when it is opened; what is wrong with one record is a BadRecord when
that is read. Options are the keyword arguments of the functions below. Parsed indices are kept in the cache.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect

import numpy as np

from blip2_jax.data.records import Source
from blip2_jax.data.sources import names

# Module and function, imported when they are first needed: most runs need one.
_KINDS = {
    "nano": ("arrayrecord", "open_nano"),
    "arrayrecord": ("arrayrecord", "open_arrayrecord"),
    "folder": ("folder", "open_folder"),
    "jsonl": ("jsonl", "open_jsonl"),
    "webdataset": ("webdataset", "open_webdataset"),
    "hf": ("parquet", "open_parquet"),
    "tfds": ("tfds", "open_tfds"),
    "coco": ("coco", "open_coco"),
    "vqa": ("vqa", "open_vqa"),
    "gqa": ("vqa", "open_gqa"),
    "vg": ("visual_genome", "open_visual_genome"),
}


def open_source(name: str) -> Source:
    """Open the source that a string such as "folder:my_pictures" names.

    Raises:
      ValueError: the name has no such form, kind or option, or the files are not what they should be.
      OSError: files are not there, or there is no room in the cache.
    """
    kind, what, options = names.parse(name)
    if kind not in _KINDS:
        raise ValueError(f"data source {name!r}: there is no kind {kind!r}; there are {', '.join(_KINDS)}")
    module, function = _KINDS[kind]
    opener = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    parameters = inspect.signature(opener).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    if unknown := [option for option in options if option not in known]:
        there_are = f"there are {', '.join(known)}" if known else "there is none"
        raise ValueError(f"data source {name!r}: {kind} has no option {unknown[0]!r}; {there_are}")
    return opener(what, **options)


def identify(*parts: str) -> np.ndarray:
    """The two words of a 64-bit hash, uint32[2]: how batches name images and captions (jax would wrap an int64)."""
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return np.frombuffer(digest, np.uint32)
