"""What the files of a checkpoint were when it was whole, so that damage is seen before a run goes on from it.

Orbax lets a checkpoint appear only when it is whole; what happens to it afterwards, a file lost, cut short or changed
by the storage, it does not see.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys

from blip2_jax import files

_FILE = "manifest.json"
_ALWAYS = ("_CHECKPOINT_METADATA", "config.json", "frozen.json")  # Without a manifest at least these are looked for.


def write(checkpoint: pathlib.Path) -> None:
    """Note size and SHA-256 of all files of a whole checkpoint, in the checkpoint."""
    names = sorted(file.relative_to(checkpoint).as_posix() for file in checkpoint.rglob("*") if file.is_file())
    content = {
        name: {"bytes": (checkpoint / name).stat().st_size, "sha256": _hash(checkpoint / name)} for name in names
    }
    files.write_json(checkpoint / _FILE, content)


def damage(checkpoint: pathlib.Path) -> str:
    """What is wrong with a checkpoint; "" if nothing is.

    One without a manifest, from a run that was killed before it was written, is held to be whole if its files are
    there; but not in an object store, which shows a checkpoint file by file.
    """
    if not (checkpoint / _FILE).exists():
        if files.in_object_store(checkpoint):
            return f"{_FILE} is missing, which is written last"
        missing = [name for name in _ALWAYS if not (checkpoint / name).exists()]
        return f"{missing[0]} is missing" if missing else ""
    try:
        known = json.loads((checkpoint / _FILE).read_text())
    except ValueError:
        return f"{_FILE} is cut short"
    for name, facts in known.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes, not {facts['bytes']:,}"
        if _hash(file) != facts["sha256"]:
            return f"{name} has been changed"
    return ""


def steps(directory: pathlib.Path) -> list[int]:
    """The steps of the checkpoints under `directory`, the newest first."""
    return sorted((int(folder.name) for folder in directory.glob("*") if folder.name.isdigit()), reverse=True)


def set_damaged_aside(directory: pathlib.Path) -> None:
    """Move damaged checkpoints to DIRECTORY/../damaged, from the newest down to one that is whole, and say so."""
    for step in steps(directory):
        checkpoint = directory / str(step)
        found = damage(checkpoint)
        if not found:
            return
        place = directory.parent / "damaged"
        place.mkdir(exist_ok=True)
        number = sum(folder.name.split(".")[0] == str(step) for folder in place.iterdir())
        moved = checkpoint.replace(place / (f"{step}.{number}" if number else str(step)))
        print(f"the checkpoint of step {step} is damaged: {found}; moved to {moved}", file=sys.stderr)


def _hash(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
