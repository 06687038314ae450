"""One picture of a corpus: images from all over it, each above its first caption."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blip2_jax import files
from blip2_jax.data import images
from blip2_jax.data.records import Record, Source

COLUMNS, ROWS = 8, 6

# Pixels.
_IMAGE = (224, 168)
_GAP, _MARGIN, _HEADER, _PADDING = 20, 40, 96, 10
_TEXT, _LINE, _LINES, _TITLE = 15, 20, 3, 26
_PAPER, _PANEL, _INK, _PALE = "#ffffff", "#f3f4f6", "#1c1e21", "#5f6368"
# Pillow brings a font for English alone. Of these, which systems often have, the first with all letters is taken.
_FONTS = ("NotoSans-Regular", "DejaVuSans", "NotoSansCJK-Regular", "wqy-zenhei", "Arial Unicode", "arialuni")

Font = ImageFont.FreeTypeFont


@functools.cache
def _fonts(size: int) -> list[Font]:
    found = [ImageFont.load_default(size)]
    for name in _FONTS:
        for suffix in (".ttf", ".ttc"):
            try:
                found.append(ImageFont.truetype(name + suffix, size))
            except OSError:
                continue
    return found


@functools.lru_cache(maxsize=4096)
def _draws(font: Font, letter: str) -> bool:
    """Whether a font has a letter; in place of those that it lacks it draws what it draws for no letter at all."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff"))


def font_for(text: str, size: int) -> Font:
    """A font that has most of a text's letters."""
    return max(_fonts(size), key=lambda font: sum(_draws(font, letter) for letter in set(text)))


def wrap(text: str, font: Font, width: int, lines: int) -> list[str]:
    """A text in at most so many lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    found, line = [], ""
    for letter in " ".join(text.split()):
        if font.getlength(line + letter) <= width:
            line += letter
            continue
        # After the last space, or in the middle of what has none.
        head, _, tail = line.rpartition(" ")
        found.append(head or line)
        line = ((tail if head else "") + letter).lstrip()
        if len(found) == lines:
            last = found[-1]
            while font.getlength(last + "…") > width:
                last = last[:-1]
            return [*found[:-1], last.rstrip(" ,.;") + "…"]
    return [*found, line]


def _text(record: Record) -> str:
    return next(iter(record.get("captions", [])), record.get("question", record["key"]))


def _thumbnail(record: Record) -> Image.Image:
    image = Image.fromarray(np.asarray(images.decode(record["image"], record["key"])))
    scale = min(room / side for room, side in zip(_IMAGE, image.size, strict=True))
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def _write_lines(pen: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], font: Font, ink: str) -> None:
    for number, line in enumerate(lines):
        pen.text((place[0], place[1] + number * _LINE), line, ink, font)


def _draw_cell(sheet: Image.Image, record: Record, left: int, top: int) -> None:
    pen, text = ImageDraw.Draw(sheet), _text(record)
    pen.rounded_rectangle((left, top, left + _IMAGE[0] - 1, top + _IMAGE[1] - 1), 8, _PANEL)
    try:
        thumbnail = _thumbnail(record)
    except ValueError as error:  # Where images were not checked.
        font, inside = font_for(str(error), _TEXT), (left + _PADDING, top + _PADDING)
        _write_lines(pen, inside, wrap(str(error), font, _IMAGE[0] - 2 * _PADDING, 7), font, _PALE)
    else:
        x, y = ((room - side) // 2 for room, side in zip(_IMAGE, thumbnail.size, strict=True))
        sheet.paste(thumbnail, (left + x, top + y))
    font = font_for(text, _TEXT)
    _write_lines(pen, (left, top + _IMAGE[1] + _PADDING), wrap(text, font, _IMAGE[0], _LINES), font, _INK)


def draw(source: Source, title: str, subtitle: str) -> Image.Image:
    """At most 8 x 6 images, evenly spread over a source that holds at least one record."""
    count = min(COLUMNS * ROWS, len(source))
    records = [source[len(source) * number // count] for number in range(count)]
    lines = max(len(wrap(_text(record), font_for(_text(record), _TEXT), _IMAGE[0], _LINES)) for record in records)
    columns = min(COLUMNS, count)
    right, down = _IMAGE[0] + _GAP, _IMAGE[1] + _PADDING + lines * _LINE + _GAP
    # A title needs some room, however few the images are.
    width = 2 * _MARGIN + max(columns, 4) * right - _GAP
    height = _HEADER + _MARGIN + math.ceil(count / columns) * down - _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    for text, size, top, ink in ((title, _TITLE, 26, _INK), (subtitle, _TEXT, 62, _PALE)):
        font = font_for(text, size)
        ImageDraw.Draw(sheet).text((_MARGIN, top), wrap(text, font, width - 2 * _MARGIN, 1)[0], ink, font)
    for number, record in enumerate(records):
        row, column = divmod(number, columns)
        _draw_cell(sheet, record, _MARGIN + column * right, _HEADER + row * down)
    return sheet


def write(file: pathlib.Path, source: Source, title: str, subtitle: str) -> None:
    """Write the sheet as a JPEG."""
    sheet = draw(source, title, subtitle)
    with files.replacing(file) as partial:
        sheet.save(partial, "JPEG", quality=90)
