"""Images that are files in a folder, described by files of annotations elsewhere: most published corpora."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from blip2_jax.data.records import BadRecord, Record
from blip2_jax.data.sources.content import captions_of, digest, file_digest, read_image
from blip2_jax.data.sources.table import Table

_PROBES = 32  # Images that are looked for when a source is opened.

Parsed = Iterable[Record | BadRecord]


class AnnotatedImages:
    """Records that name their image by a file in one of some folders."""

    def __init__(self, table: Table, folders: Sequence[pathlib.Path], identity: str, where: str):
        """Look for a few images.

        Args:
          table: the records, with `file` instead of `image`.
          folders: where images are looked for, in this order.
          identity: of the annotations.
          where: name of the source, for errors.

        Raises:
          FileNotFoundError: none of the images that were looked for is there.
        """
        self.identity = identity
        self._table, self._folders = table, list(folders)
        names = self._some_names()
        if not any(os.path.isfile(folder / name) for folder in self._folders for name in names):
            raise FileNotFoundError(
                f"{where}: of {len(names)} images looked for none is there, the first {names[0]}, in "
                f"{' or '.join(map(str, self._folders))}; check from which folder on the names are meant"
            )

    def _some_names(self) -> list[str]:
        """Files of usable records, spread over the source; there is one at least, since a table has one."""
        name_of = lambda index: self._entry(index).get("file")
        step = max(1, len(self._table) // _PROBES)
        names = list(filter(None, map(name_of, range(0, len(self._table), step))))
        return names or [next(filter(None, map(name_of, range(len(self._table)))))]

    def _entry(self, index: int) -> Record:
        try:
            return self._table[index]
        except BadRecord:
            return {}

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Record:
        record = self._table[index]
        return record | {"image": read_image(self._folders, record.pop("file"), record["key"])}


def open_annotated(
    files: Sequence[pathlib.Path],
    folders: Sequence[pathlib.Path],
    options: Sequence[str],
    parse: Callable[[], Parsed],
    where: str,
) -> AnnotatedImages:
    """Open annotations; they are parsed if the cache does not have them.

    Args:
      files: of annotations.
      folders: of images.
      options: all else that the records depend on, the layout of the files first.
      parse: from the files to records with `file` instead of `image`.
      where: name of the source, for errors.

    Raises:
      ValueError, OSError: a file is not what `parse` expects, no record can be used, or no image is there.
    """
    identity = digest([*options, *map(file_digest, files)])
    try:
        table = Table.open([identity], parse, where)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        names = ", ".join(map(str, files))
        raise ValueError(f"{where}: {names}: the layout is not that of {options[0]} ({error!r})") from error
    return AnnotatedImages(table, folders, identity, where)


def read_json(file: pathlib.Path, slim: Callable[[dict], Any]) -> Any:
    """What is in a JSON file, each object of it made smaller by `slim` as soon as it is read.

    Raises:
      ValueError: it is no JSON.
    """
    try:
        with file.open(encoding="utf-8") as stream:
            return json.load(stream, object_hook=slim)
    except ValueError as error:
        raise ValueError(f"{file} is not a JSON file: {error}") from error


def captioned(key: str, file: str, captions: Any, **rest: Any) -> Record | BadRecord:
    """A record of an image file, or why it cannot be used."""
    try:
        return {"key": key, "file": file, "captions": captions_of(captions, key), **rest}
    except BadRecord as problem:
        return problem
