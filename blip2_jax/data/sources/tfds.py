"""Data sets that TFDS has prepared as ArrayRecord files; neither TensorFlow nor the script that made them is needed."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from blip2_jax.data.records import BadRecord, Record
from blip2_jax.data.sources.content import CAPTION_FIELDS, captions_of, digest

_USUAL = {"image": ("image",), "text": ("captions/text", *CAPTION_FIELDS)}
_KINDS = {"image": tfds.features.Image, "text": tfds.features.Text}


def open_tfds(what: str, *, split: str = "", data_dir: str = "", image: str = "", text: str = "") -> TfdsSplit:
    """tfds:NAME, NAME/CONFIG or NAME/CONFIG:VERSION, such as tfds:coco_captions/2014?split=train.

    The key of a record is the split and its place in it. Data are prepared with `tfds build NAME
    --file_format=array_record`, for which many data sets need TensorFlow.

    Args:
      what: behind "tfds:".
      split: such as "train", "train[:10%]" or "train+restval"; may be left out where there is only one.
      data_dir: where TFDS keeps its data; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
      image: the feature of the images; by default "image", or the only one that can be.
      text: the feature of the captions; by default "captions/text", "captions", "caption", "text", or likewise.
    """
    where = f"tfds:{what}"
    try:
        # `tfds.builder` would run the script of a data set that it knows, and such scripts import TensorFlow.
        builder = tfds.core.read_only_builder.builder_from_files(what, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        command = f"tfds build {what} --file_format=array_record" + (f" --data_dir={data_dir}" if data_dir else "")
        raise FileNotFoundError(f"{where}: {error}\nTo prepare it: {command}") from error
    splits = sorted(builder.info.splits)
    if not split and len(splits) != 1:
        raise ValueError(f"{where}: name a split with ?split=NAME; there are {', '.join(splits)}")
    return TfdsSplit(builder, split or splits[0], image, text, where)


class TfdsSplit:
    """A split of a prepared data set."""

    def __init__(self, builder: tfds.core.DatasetBuilder, split: str, image: str, text: str, where: str):
        """Find features and files.

        Args:
          builder: of the prepared data.
          split, image, text: as of `open_tfds`, `split` not empty.
          where: name of the source, for errors.

        Raises:
          ValueError: there is no such split or feature, or the files are no ArrayRecord files.
          FileNotFoundError: a file of the split is not there.
        """
        self._split, features = split, builder.info.features
        self._image, self._text = _feature(features, image, "image", where), _feature(features, text, "text", where)
        try:
            decoders = {self._image[0]: tfds.decode.SkipDecoding()}
            self._reader: Sequence[dict] = builder.as_data_source(split=split, decoders=decoders)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{where}?split={split}: {error}") from error
        files = builder.info.splits[split].file_instructions
        if missing := [file.filename for file in files if not pathlib.Path(file.filename).exists()]:
            raise FileNotFoundError(
                f"{where}: {len(missing)} of {len(files)} files are not there, such as {missing[0]}"
            )
        if not len(self._reader):
            raise ValueError(f"{where}?split={split} holds no record")
        parts = (f"{pathlib.Path(file.filename).name}:{file.skip}:{file.take}" for file in files)
        size = str(int(builder.info.dataset_size))
        self.identity = digest(["tfds", builder.info.full_name, size, *self._image, *self._text, *parts])

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Record:
        key = f"{self._split}/{index}"
        try:
            example = self._reader[index]
        except RuntimeError as error:
            raise BadRecord("unreadable", key, f"the ArrayRecord file is damaged: {error}") from error
        return {
            "key": key,
            "image": _value(example, self._image),
            "captions": captions_of(_value(example, self._text), key),
        }


def _leaves(features: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths of features, which may themselves hold slashes, and what they are; also of those inside of sequences."""
    for name, feature in features.items():
        inner = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
        if isinstance(inner, tfds.features.FeaturesDict):
            yield from (((name, *path), leaf) for path, leaf in _leaves(inner))
        else:
            yield (name,), inner


def _feature(features: Mapping[str, Any], chosen: str, option: str, where: str) -> tuple[str, ...]:
    """The path of a feature: the chosen one, one with a usual name, or the only one of its kind."""
    leaves = dict(_leaves(features))
    fitting = {"/".join(path): path for path, leaf in leaves.items() if isinstance(leaf, _KINDS[option])}
    candidates = [chosen] if chosen else list(fitting) if len(fitting) == 1 else _USUAL[option]
    name = next((name for name in candidates if name in fitting), None)
    if name is None:
        raise ValueError(
            f"{where}: expected {f'the feature {chosen}' if chosen else 'a feature'} of {option}s; name it with "
            f"?{option}=FEATURE; can be: {', '.join(fitting) or 'none'}; there are "
            f"{', '.join('/'.join(path) for path in leaves)}"
        )
    return fitting[name]


def _value(example: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = example
    for name in path:
        value = value[name]
    return value.tolist() if hasattr(value, "tolist") else value
