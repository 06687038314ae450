"""The contact sheet: images from everywhere, captions inside their cells."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFont

from blip2_jax.data import contact_sheet


class Greys:
    """Record i is an image of the grey level i."""

    def __init__(self, length):
        self._length = length

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        stream = io.BytesIO()
        Image.new("RGB", (30, 40), (index, index, index)).save(stream, "PNG")
        return {"key": str(index), "image": stream.getvalue(), "captions": [f"number {index}"]}


def test_images_are_from_everywhere_and_in_order():
    sheet = np.asarray(contact_sheet.draw(Greys(96), "title", "subtitle"))
    left = [40 + column * (224 + 20) + 112 for column in range(8)]
    top = [96 + row * (168 + 10 + 20 + 20) + 84 for row in range(6)]
    assert sheet[np.ix_(top, left)][..., 0].ravel().tolist() == list(range(0, 96, 2))


def test_few_images_make_a_small_sheet():
    assert contact_sheet.draw(Greys(3), "title", "subtitle").height < 350


def test_what_cannot_be_decoded_says_so_in_its_place():
    class Broken(Greys):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"image": b"not an image"}

    sheet = np.asarray(contact_sheet.draw(Broken(1), "title", "subtitle"))
    panel = sheet[96 : 96 + 168, 40 : 40 + 224]
    assert 0.01 < (panel < 200).mean() < 0.2  # Text on a pale ground.


@pytest.mark.parametrize(
    "text", ["short", "a caption of many words " * 9, "Donaudampfschifffahrt" * 9, "一只猫" * 90, ""]
)
def test_lines_keep_to_their_room(text):
    font = ImageFont.load_default(15)
    lines = contact_sheet.wrap(text, font, 224, 3)
    assert len(lines) <= 3
    assert all(font.getlength(line) <= 224 for line in lines)
    whole = " ".join(text.split())
    assert "".join("".join(lines).split()) == "".join(whole.split()) or lines[-1].endswith("…")
    assert lines[0][:5] == whole[:5]


def test_the_font_has_the_letters():
    default = ImageFont.load_default(15).getname()
    assert contact_sheet.font_for("plain", 15).getname() == default
    has = lambda font: font.getmask("К").getbbox() and bytes(font.getmask("К")) != bytes(font.getmask("\U0010ffff"))
    if not any(has(font) for font in contact_sheet._fonts(15)):
        pytest.skip("no font with Cyrillic letters here")
    assert has(contact_sheet.font_for("Кот", 15))
