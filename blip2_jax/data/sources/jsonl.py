"""One JSON object a line: a user's own list of images, and the metadata.jsonl of a Hugging Face image folder."""

from __future__ import annotations

import array
import contextlib
import hashlib
import itertools
import json
import pathlib
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from blip2_jax.data.records import BadRecord, Record
from blip2_jax.data.sources.annotated import AnnotatedImages, Parsed, captioned, open_annotated
from blip2_jax.data.sources.content import answers_of, caption_field

_IMAGE_FIELDS = ("image", "file_name")


def open_jsonl(what: str, *, image: str = "", text: str = "") -> AnnotatedImages:
    """jsonl:FILE, of lines {"image": PATH, "caption": TEXT}, where paths start from the folder of FILE.

    The caption may be a list. Lines of the same image are one record, with the other fields of the first of them; its
    key is PATH. A line with a "question" is a record of its own, PATH#LINE, that needs no caption; its "answers" are a
    list.

    Args:
      what: behind "jsonl:".
      image: the field of the path; "image" or "file_name" by default.
      text: the field of the captions; "captions", "caption" or "text" by default.
    """
    file = pathlib.Path(what).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"jsonl:{what}: no such file")
    return open_lines([file], file.parent, f"jsonl:{what}", image, text)


def open_lines(files: Sequence[pathlib.Path], root: pathlib.Path, where: str, image: str, text: str) -> AnnotatedImages:
    """Open files of such lines under `root`, each with paths that start from its own folder."""
    lines = _Lines(files, root, (image,) if image else _IMAGE_FIELDS, text)
    return open_annotated(files, [root], ["jsonl", image, text, *lines.names], lines.records, where)


class _Lines:
    """Lines of files, which are read twice: to find those of the same image, and to make records of them."""

    def __init__(self, files: Sequence[pathlib.Path], root: pathlib.Path, image_fields: Sequence[str], text: str):
        self.names = [file.relative_to(root).as_posix() for file in files]
        self._files, self._image_fields, self._text = files, image_fields, text
        self._folders = [posixpath.dirname(name) for name in self.names]

    def records(self) -> Parsed:
        lines, records = self._group()
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(file.open("rb")) for file in self._files]
            for members in records:
                found = []
                for file, number, offset in lines[members].tolist():
                    streams[file].seek(offset)
                    found.append((file, number, streams[file].readline()))
                yield self._record(found)

    def _group(self) -> tuple[np.ndarray, Iterator[np.ndarray]]:
        """uint64[N, 3] of file, number and offset of each line; and those of each record, in order of appearance."""
        lines, images = array.array("Q"), array.array("Q")
        for file, path in enumerate(self._files):
            with path.open("rb") as stream:
                offset = 0
                for number, content in enumerate(stream, start=1):
                    if content.strip():
                        image = self._image(file, number, content)
                        # 64 bits an image instead of its name: of three million two agree by chance once in a million.
                        encoded = image.encode(errors="surrogatepass")
                        images.append(int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest()))
                        lines.extend((file, number, offset))
                    offset += len(content)
        _, first, member = np.unique(np.asarray(images), return_index=True, return_inverse=True)
        first_line = first[member]
        order = np.argsort(first_line, kind="stable")
        starts = np.flatnonzero(np.diff(first_line[order], prepend=-1))
        records = (order[start:end] for start, end in itertools.pairwise(np.append(starts, len(order))))
        return np.asarray(lines).reshape(-1, 3), records

    def _image(self, file: int, number: int, content: bytes) -> str:
        """What lines must share to be one record."""
        try:
            image, item = self._parse(file, number, content)
        except BadRecord as problem:
            return problem.where
        return f"{image}#{number}" if "question" in item else image

    def _parse(self, file: int, number: int, content: bytes) -> tuple[str, dict[str, Any]]:
        """The path of the image from the root on, and the other fields; raises BadRecord if the line has no image."""
        try:
            item = json.loads(content)
            field = next(name for name in self._image_fields if name in item)
            return posixpath.join(self._folders[file], item.pop(field).removeprefix("./")), item
        except UnicodeDecodeError as error:
            where = f"{self.names[file]}, line {number}"
            raise BadRecord("caption_not_utf8", where, f"the line is not UTF-8: {error}") from error
        except (StopIteration, TypeError, AttributeError, json.JSONDecodeError) as error:
            where = f"{self.names[file]}, line {number}"
            expected = f'{{"{self._image_fields[0]}": PATH, "{self._text or "caption"}": TEXT}}'
            found = content[:80].decode(errors="replace").strip()
            raise BadRecord("unreadable", where, f"expected {expected}, found {found}") from error

    def _record(self, lines: Sequence[tuple[int, int, bytes]]) -> Record | BadRecord:
        try:
            (image, item), *others = [self._parse(*line) for line in lines]
            if "question" in item:
                return self._question(f"{image}#{lines[0][1]}", image, item)
        except BadRecord as problem:
            return problem
        captions = self._captions(item)
        for _, other in others:
            captions += self._captions(other)
        record = captioned(image, image, captions)
        return record if isinstance(record, BadRecord) else item | record

    def _captions(self, item: dict[str, Any]) -> list:
        """Takes the captions out of the fields of a line."""
        field = caption_field(item, self._text)
        captions = item.pop(field) if field else None
        return captions if isinstance(captions, list) else [captions]

    def _question(self, key: str, image: str, item: dict[str, Any]) -> Record:
        answers = item.get("answers", [])
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise BadRecord("unreadable", key, f'expected "answers" as a list of texts, found {str(answers)[:80]}')
        weighted = answers_of(answers) if answers and "weights" not in item else {}
        return item | weighted | {"key": key, "file": image}
