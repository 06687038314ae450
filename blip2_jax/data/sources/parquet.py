"""Parquet files with images in them, as data sets on the Hugging Face hub have them, once they are on a disk."""

from __future__ import annotations

import fnmatch
import pathlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as types

from blip2_jax.data.records import BadRecord, Record
from blip2_jax.data.sources.content import CAPTION_FIELDS, captions_of, digest

_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")


def open_parquet(what: str, *, image: str = "", text: str = "", split: str = "") -> ParquetFiles:
    """hf:DIR, of parquet files at any depth: a column of images as {bytes, path} or bytes, and one of captions.

    Captions are a text or a list of texts. The key of a record is its file's path in DIR and its row. A row costs its
    whole row group, which shuffling reads again for each of its rows: `prepare` what is larger than memory.

    Args:
      what: behind "hf:".
      image: the column of the images; by default one with a usual name, or the only one that can be.
      text: the column of the captions; by default likewise.
      split: of which files: a pattern for the name of a folder, or of a file up to "-" or ".", such as "train".
    """
    root, where = pathlib.Path(what).expanduser(), f"hf:{what}"
    if not root.is_dir():
        raise FileNotFoundError(f"{where}: no such folder")
    names = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.parquet"))
    if not names:
        raise FileNotFoundError(f"{where}: there is no parquet file in it")
    chosen = [name for name in names if not split or _is_of_split(name, split)]
    if not chosen:
        raise FileNotFoundError(f"{where}: no file is of split={split}; there are {', '.join(names[:10])}")
    return ParquetFiles(root, chosen, image, text, where)


def _is_of_split(name: str, pattern: str) -> bool:
    parts = pathlib.PurePosixPath(name).parts
    return any(fnmatch.fnmatchcase(part, glob) for part in parts for glob in (pattern, f"{pattern}[-.]*"))


class ParquetFiles:
    """Rows of parquet files; each thread keeps the row group that it has read last."""

    def __init__(self, root: pathlib.Path, names: Sequence[str], image: str, text: str, where: str):
        """Read what the files say of themselves.

        Args:
          root: their folder.
          names: their paths in it, in order.
          image, text: columns, as of `open_parquet`.
          where: name of the source, for errors.

        Raises:
          ValueError: one is no parquet file or has no such column, or there is no row.
        """
        self._root, self._names = root, list(names)
        groups, ends = [], [0]
        for number, name in enumerate(names):
            metadata = _metadata(root / name, where)
            schema = metadata.schema.to_arrow_schema()
            if not number:
                self._image = _column(schema, image, _holds_images, _IMAGE_COLUMNS, "image", where)
                self._text = _column(schema, text, _holds_captions, CAPTION_FIELDS, "text", where)
            if absent := {self._image, self._text} - set(schema.names):
                raise ValueError(f"{where}: {name} has no column {', '.join(sorted(absent))}, which {names[0]} has")
            first = ends[-1]
            for group in range(metadata.num_row_groups):
                groups.append((number, group, first))
                ends.append(ends[-1] + metadata.row_group(group).num_rows)
        self._groups, self._ends = groups, np.array(ends[1:], np.int64)
        if not ends[-1]:
            raise ValueError(f"{where} holds no record")
        sizes = (f"{name}:{(root / name).stat().st_size}" for name in names)
        self.identity = digest(["parquet", self._image, self._text, *sizes])
        self._last = threading.local()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} records, no number {index}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        file, _, first = self._groups[number]
        key = f"{self._names[file]}, row {index - first}"
        try:
            columns = self._read(number)
            row = index - int(self._ends[number]) + columns.num_rows
            image, captions = (columns.column(name)[row].as_py() for name in (self._image, self._text))
        except UnicodeDecodeError as error:
            raise BadRecord("caption_not_utf8", key, f"the caption is not UTF-8: {error}") from error
        except (pa.ArrowException, OSError) as error:
            raise BadRecord("unreadable", key, f"{self._names[file]} cannot be read: {error}") from error
        encoded = image["bytes"] if isinstance(image, dict) else image
        if encoded is None:
            raise BadRecord("missing", key, f"expected the image's bytes, found {image}")
        return {"key": key, "image": encoded, "captions": captions_of(captions, key)}

    def _read(self, number: int) -> pa.Table:
        """Images and captions of a row group."""
        if getattr(self._last, "number", None) != number:
            file, group, _ = self._groups[number]
            with pq.ParquetFile(self._root / self._names[file]) as stream:
                # Readers are threads already.
                columns = stream.read_row_group(group, columns=[self._image, self._text], use_threads=False)
            self._last.number, self._last.columns = number, columns
        return self._last.columns

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_last"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _last=threading.local())


def _metadata(file: pathlib.Path, where: str) -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where}: {file} is no whole parquet file ({error}); download it again") from error


def _holds_images(kind: pa.DataType) -> bool:
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _holds_captions(kind: pa.DataType) -> bool:
    if types.is_list(kind) or types.is_large_list(kind):
        return _holds_captions(kind.value_type)
    if types.is_dictionary(kind):
        return _holds_captions(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind)


def _column(
    schema: pa.Schema, chosen: str, fits: Callable[[Any], bool], usual: Sequence[str], option: str, where: str
) -> str:
    """The name of a column: the chosen one, one with a usual name, or the only one that fits."""
    fitting = [field.name for field in schema if fits(field.type)]
    candidates = [chosen] if chosen else usual if len(fitting) != 1 else fitting
    column = next((name for name in candidates if name in fitting), None)
    if column is None:
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(
            f"{where}: expected {f'the column {chosen}' if chosen else 'a column'} of {option}s; name it with "
            f"?{option}=COLUMN; can be: {', '.join(fitting) or 'none'}; there are {found}. Addresses of images must be "
            "fetched first, such as with img2dataset"
        )
    return column
