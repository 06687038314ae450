"""Tar shards of WebDataset, as img2dataset writes them, on a disk or in a bucket, read in any order."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import fsspec
import numpy as np

from blip2_jax.checkpoints.downloads import cache_directory
from blip2_jax.data.records import BadRecord, Record
from blip2_jax.data.sources import tar
from blip2_jax.data.sources.content import IMAGE_SUFFIXES, caption_field, captions_of, digest, relative_names
from blip2_jax.data.sources.names import expand_braces
from blip2_jax.data.sources.table import Table

_VERSION = "1"  # Of what the cache holds about a shard.
_THREADS = 32  # That wait for a disk or a network.


def open_webdataset(what: str, *, text: str = "") -> WebDataset:
    """webdataset:GLOB, such as "cc3m/{00000..00331}.tar" or "gs://bucket/cc3m/*.tar": tar files, not compressed.

    A sample is an image with its caption in a txt member, or else in a field of a json member. Its key is the shard's
    path without what all shards share, and the sample's name. Headers are read when shards are first opened: of a disk
    those alone, of a bucket all else with them.

    Args:
      what: behind "webdataset:"; remote paths are those of fsspec.
      text: a field of the json member, in the place of the txt member.
    """
    where = f"webdataset:{what}"
    filesystem, paths = None, []
    for pattern in expand_braces(what):
        filesystem, path = fsspec.core.url_to_fs(pattern)
        found = sorted(filesystem.glob(path)) if set(path) & set("*?[") else [path]
        if not found:
            raise FileNotFoundError(f"{where}: no file matches {pattern}; expected tar shards")
        paths += found
    return WebDataset(filesystem, paths, text, where)


class WebDataset:
    """Samples of tar shards: members that follow one another and whose names are the same up to the first dot."""

    def __init__(self, filesystem: fsspec.AbstractFileSystem, paths: Sequence[str], text: str, where: str):
        """Index shards, or find their index in the cache.

        Args:
          filesystem: where they are.
          paths: of the shards.
          text: as of `open_webdataset`.
          where: name of the source, for errors.

        Raises:
          FileNotFoundError: there is no such shard.
          ValueError: one is no tar archive, or mixes its samples, or there is no sample.
        """
        self._filesystem, self._paths, self._text = filesystem, paths, text
        self._names = [name.removesuffix(".tar") for name in relative_names(paths)]
        shards = _look(filesystem, paths, where)
        versions = [shard.version for shard in shards]
        self._table = Table.open(["tar", *versions], lambda: _index(filesystem, shards, where), where)
        # Where the samples lie tells more than the sizes of shards, which are rounded.
        self.identity = digest(["webdataset", text, *self._names, self._table.sha256])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Record:
        shard, start, end = self._table[index]
        key = f"{self._names[shard]}, byte {start}"
        try:
            content = self._filesystem.cat_file(self._paths[shard], start, end)
            files = {}
            for member in tar.members(lambda offset, length: content[offset : offset + length], len(content)):
                sample, suffix = _split(member.name)
                if suffix:
                    key = f"{self._names[shard]}/{sample}"
                    files[suffix] = content[member.content : member.end]
        except FileNotFoundError as error:
            raise BadRecord("missing", key, f"the shard {self._paths[shard]} is gone") from error
        except (OSError, ValueError) as error:
            raise BadRecord("unreadable", key, f"{self._paths[shard]} cannot be read: {error}") from error
        if len(content) < end - start:
            raise BadRecord("truncated", key, f"the shard {self._paths[shard]} ends early")
        image = next((files[suffix[1:]] for suffix in IMAGE_SUFFIXES if suffix[1:] in files), None)
        if image is None:
            raise BadRecord("missing", key, f"expected an image, found {', '.join(files)}")
        return {"key": key, "image": image, "captions": captions_of(self._caption(files, key), key)}

    def _caption(self, files: dict[str, bytes], key: str) -> Any:
        if "txt" in files and not self._text:
            return files["txt"]
        try:
            fields = json.loads(files.get("json", b"{}"))
            return fields.get(caption_field(fields, self._text))
        except UnicodeDecodeError as error:
            raise BadRecord("caption_not_utf8", key, f"its json is not UTF-8: {error}") from error
        except (ValueError, AttributeError, TypeError) as error:
            raise BadRecord("caption_missing", key, f"its json is no JSON object: {error}") from error


class _Shard(NamedTuple):
    """A shard as it is now.

    Attributes:
      path: on its file system.
      size: in bytes.
      version: changes when the file changes; such as its time, or a bucket's generation.
    """

    path: str
    size: int
    version: str


def _look(filesystem: fsspec.AbstractFileSystem, paths: Sequence[str], where: str) -> list[_Shard]:
    """Shards without opening them; raises OSError if some are not there, or of a size that is not known."""

    def look(path: str) -> _Shard | None:
        try:
            about = filesystem.info(path)
        except FileNotFoundError:
            return None
        if about["size"] is None:
            raise OSError(
                f"{where}: the server does not say how large {path} is; copy the shards to a disk or a bucket"
            )
        return _Shard(path, about["size"], digest([json.dumps(about, default=str, sort_keys=True)]))

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        shards = list(pool.map(look, paths))
    missing = [path for path, shard in zip(paths, shards, strict=True) if shard is None]
    if missing:
        raise FileNotFoundError(
            f"{where}: {len(missing)} of {len(paths)} shards are not there, the first {missing[0]}; fetch them, or "
            "name only those that are there"
        )
    return shards


def _index(
    filesystem: fsspec.AbstractFileSystem, shards: Sequence[_Shard], where: str
) -> Iterator[tuple[int, int, int]]:
    """Shard, start and end of every sample; raises ValueError of all shards that cannot be read."""

    def samples(shard: _Shard) -> np.ndarray | ValueError:
        try:
            return _shard_samples(filesystem, shard)
        except ValueError as error:
            return error

    problems = []
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for number, found in enumerate(pool.map(samples, shards)):
            if isinstance(found, ValueError):
                problems.append((shards[number].path, found))
            else:
                yield from ((number, start, end) for start, end in found.tolist())
    if problems:
        path, problem = problems[0]
        raise ValueError(
            f"{where}: {len(problems)} of {len(shards)} shards cannot be read, the first {path}: {problem}; fetch or "
            "pack them again, or leave them out"
        )


def _shard_samples(filesystem: fsspec.AbstractFileSystem, shard: _Shard) -> np.ndarray:
    """uint64[N, 2], start and end in bytes of each sample, from the cache if it is there."""
    file: pathlib.Path = cache_directory() / "sources" / f"{digest([_VERSION, shard.version])}.npy"
    if file.exists():
        return np.load(file)
    with filesystem.open(shard.path, "rb") as stream:

        def read(offset: int, length: int) -> bytes:
            stream.seek(offset)
            return stream.read(length)

        samples = np.array(list(_samples(tar.members(read, shard.size))), np.uint64).reshape(-1, 2)
    partial = file.with_name(f"{file.stem}.partial-{uuid.uuid4().hex}.npy")
    try:
        np.save(partial, samples)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return samples


def _samples(members: Iterator[tar.Member]) -> Iterator[tuple[int, int]]:
    """Start and end of each sample of a shard."""
    current, start, end, seen = "", 0, 0, set()
    for member in members:
        name, suffix = _split(member.name)
        if not suffix:
            continue
        if name != current:
            if current:
                yield start, end
            if name in seen:
                raise ValueError(f"the files of {name} do not follow one another; pack them with tar --sort=name")
            seen.add(name)
            current, start = name, member.start
        end = member.end
    if current:
        yield start, end


def _split(name: str) -> tuple[str, str]:
    """ "a/b.seg.png" to "a/b" and "seg.png"; without a suffix, what belongs to no sample: hidden files and notes."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), (suffix.lower() if stem and not stem.startswith("__") else "")
