"""Rebuild blip2_jax/assets/pictures/*.arrayrecord: two artists' drawings of about 1,900 things, with captions.

    python -m blip2_jax.assets.build.pictures --output blip2_jax/assets/pictures

Sources: the npm packages emoji-datasource-google (Noto Emoji, Apache-2.0) and emoji-datasource-twitter (Twemoji,
CC BY 4.0), both 16.0.0, by Cal Henderson (MIT). Pictures are composed on white and stored as 64 x 64 WebP; the same
Pillow gives the same bytes.

Splits, by a hash of the thing, so that they never move:
  test_concept, val_concept    things (with all their relatives, see names.family) never seen in any drawing
  test_drawing, val_drawing    Twemoji drawings of things whose Noto drawing is in train
  train                        the rest
  train_tones                  the drawings of train in the five skin tones, captioned as such
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pathlib
import subprocess
import tarfile
import tempfile
from collections import defaultdict

import msgpack
from PIL import Image
from tqdm import tqdm

from blip2_jax.assets.build import names
from blip2_jax.data.shards import write_shard

PACKAGES = {
    "noto": ("emoji-datasource-google", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"),
    "twemoji": ("emoji-datasource-twitter", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
}
VERSION = "16.0.0"
SIDE = 64
TONES = {
    "1F3FB": "light skin tone",
    "1F3FC": "medium light skin tone",
    "1F3FD": "medium skin tone",
    "1F3FE": "medium dark skin tone",
    "1F3FF": "dark skin tone",
}
# Some things are drawn exactly alike (Svalbard flies Norway's flag). Of each such group these stay, the others go.
KEPT_OF_LOOK_ALIKES = (
    "FAMILY: ADULT, ADULT, CHILD",
    "FAMILY: ADULT, ADULT, CHILD, CHILD",
    "FAMILY: ADULT, CHILD",
    "FAMILY: ADULT, CHILD, CHILD",
    "Australia Flag",
    "Norway Flag",
    "France Flag",
    "Saudi Arabia Flag",
    "British Indian Ocean Territory Flag",
    "Spain Flag",
    "United States Flag",
)
# Shares of the things, in thousandths: see `split`.
CONCEPT_SHARES = {"test_concept": 125, "val_concept": 50}
DRAWING_SHARES = {"test_drawing": 250, "val_drawing": 120}


def _fetch(directory: pathlib.Path) -> None:
    for package, sha256 in PACKAGES.values():
        subprocess.run(["npm", "pack", "--silent", f"{package}@{VERSION}"], cwd=directory, check=True)
        archive = directory / f"{package}-{VERSION}.tgz"
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != sha256:
            raise ValueError(f"{archive.name}: expected SHA-256 {sha256}, found {found}")


class Drawings:
    """One artist's pictures, read from the package's archive."""

    def __init__(self, archive: pathlib.Path):
        with tarfile.open(archive) as tar:
            self._files = {
                pathlib.PurePosixPath(member.name).name: tar.extractfile(member).read()
                for member in tar.getmembers()
                if f"/{SIDE}/" in member.name and member.isfile()
            }

    def __call__(self, name: str) -> Image.Image:
        picture = Image.open(io.BytesIO(self._files[name])).convert("RGBA")
        canvas = Image.new("RGBA", picture.size, "white")
        canvas.alpha_composite(picture)
        return canvas.convert("RGB")


def look_alikes(entries: list[dict], drawings: dict[str, Drawings]) -> set[str]:
    """Code points of things to leave out: some artist draws them exactly as a thing that stays."""
    dropped = set()
    for draw in drawings.values():
        groups = defaultdict(list)
        for entry in entries:
            groups[draw(entry["image"]).tobytes()].append(entry)
        for group in groups.values():
            kept = [entry for entry in group if entry["name"] in KEPT_OF_LOOK_ALIKES]
            if len(group) > 1 and len(kept) != 1:
                raise ValueError(f"say in KEPT_OF_LOOK_ALIKES which one stays: {[e['name'] for e in group]}")
            if len(group) > 1:
                dropped |= {entry["unified"] for entry in group if entry not in kept}
    return dropped


def _thousandth(salt: str, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{salt}/{text}".encode()).digest()[:8], "big") % 1000


def _share(shares: dict[str, int], draw: int) -> str | None:
    for name, share in shares.items():
        if draw < share:
            return name
        draw -= share
    return None


def split(entry: dict, artist: str) -> str:
    """The split that this artist's drawing of a thing belongs to."""
    concept = _share(CONCEPT_SHARES, _thousandth("concept", names.family(entry)))
    if concept:
        return concept
    drawing = _share(DRAWING_SHARES, _thousandth("drawing", entry["unified"]))
    return drawing if drawing and artist == "twemoji" else "train"


def record(picture: Image.Image, entry: dict, artist: str, caption: str, tone: str = "") -> dict:
    encoded = io.BytesIO()
    picture.save(encoded, "WEBP", quality=90, method=6)
    thing = entry["unified"].lower()
    return {
        "key": f"{artist}/{thing}" + (f"/{tone}" if tone else ""),
        "image": encoded.getvalue(),
        "captions": [caption],
        "category": entry["category"].lower().replace("&", "and"),
        "subcategory": entry["subcategory"].lower().replace("&", "and").replace("-", " "),
    }


def build(output: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        _fetch(directory)
        archives = {artist: directory / f"{package}-{VERSION}.tgz" for artist, (package, _) in PACKAGES.items()}
        drawings = {artist: Drawings(archive) for artist, archive in archives.items()}
        with tarfile.open(archives["noto"]) as tar:
            entries = json.load(tar.extractfile("package/emoji.json"))
    entries = [entry for entry in entries if entry["category"] != "Component"]
    entries = [entry for entry in entries if entry["has_img_google"] and entry["has_img_twitter"]]
    entries.sort(key=lambda entry: entry["sort_order"])
    dropped = look_alikes(entries, drawings)
    entries = [entry for entry in entries if entry["unified"] not in dropped]
    captions = {entry["unified"]: names.caption(entry) for entry in entries}
    if len(set(captions.values())) != len(captions):
        twice = sorted(caption for caption in captions.values() if list(captions.values()).count(caption) > 1)
        raise ValueError(f"two things share a caption: {twice}")

    splits = defaultdict(list)
    for entry in tqdm(entries, desc="pictures", unit="thing"):
        caption = captions[entry["unified"]]
        for artist, draw in drawings.items():
            name = split(entry, artist)
            splits[name].append(record(draw(entry["image"]), entry, artist, caption))
            for tone, words in TONES.items():
                variant = entry.get("skin_variations", {}).get(tone)
                has = variant and variant["has_img_google" if artist == "noto" else "has_img_twitter"]
                if name == "train" and has:
                    picture = draw(variant["image"])
                    toned = f"{caption} with {words}"
                    splits["train_tones"].append(record(picture, entry, artist, toned, tone.lower()))
    for name, records in splits.items():
        path = output / f"{name}.arrayrecord"
        write_shard(path, map(msgpack.packb, records))
        print(f"{path}: {len(records)} pictures, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    build(parser.parse_args().output)
