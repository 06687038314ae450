"""A folder of images, each with its caption in a text file beside it, or with a metadata.jsonl for all of them."""

from __future__ import annotations

import os
import pathlib

from blip2_jax.data.records import BadRecord, Record, Source
from blip2_jax.data.sources.content import IMAGE_SUFFIXES, captions_of, digest, read_image
from blip2_jax.data.sources.jsonl import open_lines

_METADATA = "metadata.jsonl"


def open_folder(what: str, *, text: str = "") -> Source:
    """folder:DIR: cat.jpg with its caption in cat.txt, at any depth; or, as Hugging Face's imagefolder, metadata.jsonl.

    Lines of a metadata.jsonl are {"file_name": PATH, "text": TEXT} with paths that start from its own folder. The key
    of a record is the path of its image in DIR.

    Args:
      what: behind "folder:".
      text: the field of the captions in metadata.jsonl; "captions", "caption" or "text" by default.
    """
    root = pathlib.Path(what).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"folder:{what}: no such folder")
    sizes = _sizes(root)
    metadata = [root / name for name in sizes if pathlib.PurePosixPath(name).name == _METADATA]
    if metadata:
        return open_lines(metadata, root, f"folder:{what}", "", text)
    if text:
        raise ValueError(f"folder:{what}: text={text} names a field of {_METADATA}, but there is no {_METADATA}")
    return ImageFolder(root, sizes)


def _sizes(root: pathlib.Path) -> dict[str, int]:
    """Bytes of every file, by path under `root`, sorted; names that begin with a dot are hidden."""
    found = {}
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = pathlib.Path(folder, name)
            if not name.startswith(".") and (path.suffix.lower() in (*IMAGE_SUFFIXES, ".txt") or name == _METADATA):
                try:
                    found[path.relative_to(root).as_posix()] = path.stat().st_size
                except FileNotFoundError:  # A link to nowhere, which is one bad record.
                    found[path.relative_to(root).as_posix()] = -1
    return dict(sorted(found.items()))


class ImageFolder:
    """Images with text files beside them."""

    def __init__(self, root: pathlib.Path, sizes: dict[str, int]):
        """Of the files under `root`, those with these sizes.

        Raises:
          ValueError: there is no image.
          FileNotFoundError: no image has a caption.
        """
        suffix = lambda name: pathlib.PurePosixPath(name).suffix.lower()
        self._root = root
        self._images = [name for name in sizes if suffix(name) in IMAGE_SUFFIXES]
        if not self._images:
            raise ValueError(f"folder:{root} holds no image; expected files as {', '.join(IMAGE_SUFFIXES)}")
        if not any(_caption_file(name) in sizes for name in self._images):
            raise FileNotFoundError(
                f"folder:{root}: none of {len(self._images)} images has a caption, the first {self._images[0]}; "
                f"expected it in {_caption_file(self._images[0])}, or all of them in {_METADATA}"
            )
        self.identity = digest(["folder", *(f"{name}:{size}" for name, size in sizes.items())])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Record:
        key = self._images[index]
        image = read_image([self._root], key, key)
        try:
            caption = (self._root / _caption_file(key)).read_bytes()
        except FileNotFoundError as error:
            raise BadRecord("caption_missing", key, f"there is no {_caption_file(key)}") from error
        return {"key": key, "image": image, "captions": captions_of(caption, key)}


def _caption_file(image: str) -> str:
    return str(pathlib.PurePosixPath(image).with_suffix(".txt"))
