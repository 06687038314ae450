"""Encoded bytes to pixels: libjpeg-turbo for JPEG, Pillow for the other formats. Both give the same pixels.

A decoder reads no more than the header when it is made, so that what is too large, or of a kind that cannot be used,
costs nothing. EXIF's orientation is ignored, as by the original and therefore in every published number.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from blip2_jax.data.records import BadRecord

# Formats that Pillow may try. Others are rare and guess at any bytes, or start programs, as EPS does.
FORMATS = ("PNG", "WEBP", "GIF", "JPEG", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

# How JPEG can be decoded smaller for less work; the ratios between do not use the processor's vector instructions.
REDUCTIONS = (1, 2, 4, 8)

_BITS_PER_SAMPLE = 258  # TIFF's tag.
_TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")

# What libjpeg says of files that show what they should; at all else that it says, pixels are lost.
_HARMLESS = re.compile(r"data: \d{1,2} extraneous bytes before|Invalid SOS parameters|Adobe color transform|JFIF")

# Our own limit takes the place of Pillow's warning.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Decoder(Protocol):
    """An encoded picture whose header has been read.

    Attributes:
      width, height: in pixels.
    """

    width: int
    height: int

    def decode(self, reduction: int) -> tuple[np.ndarray, int]:
        """uint8[ceil(H / r), ceil(W / r), 3] and r: the reduction asked for, or 1 where the format knows of none.

        Raises:
          BadRecord: truncated, unreadable or deep.
        """


def open_decoder(encoded: bytes, where: str) -> Decoder:
    """The decoder of some bytes.

    Raises:
      BadRecord: by the header they are missing, unreadable, truncated, too_large for Pillow, cmyk, deep or animated.
    """
    if not encoded:
        raise BadRecord("missing", where, "the image has no bytes")
    if encoded.startswith(b"\xff\xd8"):
        try:
            header = simplejpeg.decode_jpeg_header(encoded, strict=False)
        except (ValueError, KeyError):  # No verdict: it has no name for rare samplings of the colours.
            return _Other(encoded, where)
        return _JPEG(encoded, where, *header)
    return _Other(encoded, where)


class _JPEG:
    def __init__(self, encoded: bytes, where: str, height: int, width: int, colours: str, _sampling: str):
        self.height, self.width = height, width
        if colours in ("CMYK", "YCCK"):
            raise BadRecord("cmyk", where, f"expected RGB or grey, found a JPEG in {colours}")
        self._encoded, self._where = encoded, where

    def decode(self, reduction: int) -> tuple[np.ndarray, int]:
        smallest = {"min_height": -(-self.height // reduction), "min_width": -(-self.width // reduction)}
        try:
            return simplejpeg.decode_jpeg(self._encoded, strict=True, **smallest), reduction
        except ValueError as error:
            complaint = str(error)
        # Of a file that ends early, libjpeg makes up the rest in grey; strict is the way to hear of it.
        if "premature end" in complaint.lower():
            raise BadRecord("truncated", self._where, f"the JPEG ends early: {complaint}")
        if "precision" in complaint:
            raise BadRecord("deep", self._where, f"expected 8 bits a channel: {complaint}")
        if not _HARMLESS.search(complaint):
            raise BadRecord("unreadable", self._where, f"the JPEG is damaged: {complaint}")
        return simplejpeg.decode_jpeg(self._encoded, strict=False, **smallest), reduction


class _Other:
    def __init__(self, encoded: bytes, where: str):
        self._where = where
        if encoded[:4] == b"RIFF" and int.from_bytes(encoded[4:8], "little") + 8 > len(encoded):
            raise BadRecord("truncated", where, f"the WebP ends early, after {len(encoded)} bytes")
        with self._complaints():
            self._image = Image.open(io.BytesIO(encoded), formats=FORMATS)
            self.width, self.height = self._image.size
            # Phones append previews and depth maps to a JPEG, which make it an MPO.
            frames = 1 if self._image.format == "MPO" else getattr(self._image, "n_frames", 1)
        if frames > 1:
            raise BadRecord("animated", where, f"expected one frame, found {frames} in a {self._image.format}")
        if self._image.mode == "CMYK":
            raise BadRecord("cmyk", where, f"expected RGB or grey, found a {self._image.format} in CMYK")
        if self._bits(encoded) > 8:
            raise BadRecord("deep", where, f"expected 8 bits a channel, found {self._bits(encoded)}")

    def decode(self, reduction: int) -> tuple[np.ndarray, int]:
        with self._complaints():
            self._image.load()
            return np.asarray(_opaque(self._image)), 1

    def _bits(self, encoded: bytes) -> int:
        """A channel's bits in the file, where Pillow tells or hides that it has more than 8."""
        if self._image.format == "PNG":
            return encoded[24]
        if self._image.format == "TIFF":
            return max(self._image.tag_v2.get(_BITS_PER_SAMPLE, (1,)))
        if self._image.mode.startswith("I;16"):
            return 16
        return 32 if self._image.mode in ("I", "F") else 8

    @contextlib.contextmanager
    def _complaints(self) -> Iterator[None]:
        """Turn what Pillow raises at a file into the reason why it cannot be used."""
        try:
            yield
        except Image.DecompressionBombError as error:
            raise BadRecord("too_large", self._where, str(error)) from error
        except UnidentifiedImageError as error:
            raise BadRecord(
                "unreadable", self._where, f"not a picture: expected one of {', '.join(FORMATS)}"
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # At damaged files its readers raise what they happen to meet.
            reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
            raise BadRecord(reason, self._where, f"{type(error).__name__}: {error}") from error


def _opaque(image: Image.Image) -> Image.Image:
    """In RGB; what is transparent becomes white."""
    if image.mode not in _TRANSPARENT and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return canvas.convert("RGB")
