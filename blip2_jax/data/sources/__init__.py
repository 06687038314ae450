"""Where records come from. A source is named by one string and read by index.

nano:SPLIT          the pictures that ship with the package (assets/pictures)
arrayrecord:GLOB    our own ArrayRecord files, as `assets/build/pictures.py` writes them
folder:DIR          pictures, each beside a text file of the same name that holds its caption
jsonl:FILE          one JSON object a line: {"image": PATH, "caption": TEXT}, paths relative to the file; other
                    fields, such as "category", stay with the record
"""

from __future__ import annotations

import glob
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from blip2_jax.data.images import check_image
from blip2_jax.data.records import Record, Source

PICTURES = pathlib.Path(__file__).parents[2] / "assets" / "pictures"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class ArrayRecords:
    """Records in msgpack, in one or many ArrayRecord files."""

    def __init__(self, pattern: str):
        files = sorted(glob.glob(pattern))
        if not files:
            raise FileNotFoundError(f"no file matches {pattern!r}; expected ArrayRecord files")
        self._reader = ArrayRecordDataSource(files)
        sizes = [f"{pathlib.Path(file).name}:{pathlib.Path(file).stat().st_size}" for file in files]
        self.identity = _hash(sizes)

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Record:
        return msgpack.unpackb(self._reader[index])


class ImageFiles:
    """Pictures on disk with one caption each; every picture is looked at once, when the source is opened."""

    def __init__(self, items: list[tuple[pathlib.Path, Record]], where: str):
        if not items:
            raise ValueError(f"{where} holds no picture with a caption")
        for file, _ in items:
            check_image(file)
        self._items = items
        self.identity = _hash([f"{file}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file, _ in items])

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Record:
        file, rest = self._items[index]
        return {**rest, "key": str(file), "image": file.read_bytes()}


def _folder(directory: str) -> ImageFiles:
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"folder:{directory}: no such directory")
    images = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    items, missing = [], []
    for image in images:
        text = image.with_suffix(".txt")
        if text.exists():
            items.append((image, {"captions": [_read_text(text)]}))
        else:
            missing.append(image)
    if missing:
        raise FileNotFoundError(
            f"folder:{directory}: {len(missing)} of {len(images)} pictures have no caption, the first {missing[0]}; "
            f"expected its caption in {missing[0].with_suffix('.txt').name}"
        )
    return ImageFiles(items, f"folder:{directory}")


def _read_text(file: pathlib.Path) -> str:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: the caption is not UTF-8 ({error})") from error
    if not text:
        raise ValueError(f"{file}: the caption is empty")
    return text


def _jsonl(name: str) -> ImageFiles:
    file = pathlib.Path(name)
    if not file.is_file():
        raise FileNotFoundError(f"jsonl:{name}: no such file")
    items = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            item = json.loads(line)
            image, caption = item.pop("image"), item.pop("caption")
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{where}: expected {{"image": PATH, "caption": TEXT}}, found {line[:80]!r}') from error
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{where}: the caption is empty or not a text")
        path = file.parent / image
        if not path.is_file():
            raise FileNotFoundError(f"{where}: the image {path} does not exist")
        items.append((path, item | {"captions": [caption.strip()]}))
    return ImageFiles(items, f"jsonl:{name}")


def _nano(split: str) -> ArrayRecords:
    file = PICTURES / f"{split}.arrayrecord"
    if not file.exists():
        known = sorted(path.stem for path in PICTURES.glob("*.arrayrecord"))
        raise FileNotFoundError(f"nano:{split}: no such split; there are {', '.join(known)}")
    return ArrayRecords(str(file))


_KINDS: dict[str, Callable[[str], Source]] = {
    "nano": _nano,
    "arrayrecord": ArrayRecords,
    "folder": _folder,
    "jsonl": _jsonl,
}


def open_source(name: str) -> Source:
    """Open the source that a string such as "folder:my_pictures" names."""
    kind, separator, rest = name.partition(":")
    if not separator or kind not in _KINDS:
        raise ValueError(f"data source {name!r}: expected KIND:WHAT with KIND one of {', '.join(_KINDS)}")
    return _KINDS[kind](rest)


def identify(*parts: str) -> np.ndarray:
    """The two words of a 64-bit hash, uint32[2]: how batches name images and captions (jax would wrap an int64)."""
    digest = hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()
    return np.frombuffer(digest, np.uint32)
