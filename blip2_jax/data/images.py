"""Pictures to uint8 squares: a random crop to train on, the whole to evaluate; normalisation happens on the device.

Resizing is bicubic and antialiased: the filter of Pillow, and so of the original, in a form that uses the processor's
vector instructions. Nothing here holds Python's global lock for long, so threads help.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing
from PIL import Image

from blip2_jax.data.decoders import REDUCTIONS, open_decoder
from blip2_jax.data.records import BadRecord

try:
    import cykooz_resizer
except ImportError:  # There is no wheel for Linux on ARM.
    cykooz_resizer = None
    warnings.warn(
        "without cykooz_resizer pictures are resized by Pillow: alike to a level of 255, but slower", stacklevel=2
    )

# A JPEG is decoded smaller only while a crop keeps this many times the pixels it needs, so that the difference cannot
# be seen: the last halving is always the bicubic filter's.
MARGIN = 2

_RATIOS = (3 / 4, 4 / 3)  # Width by height of a random crop, as torchvision's default.
_ATTEMPTS = 10

Box = tuple[float, float, float, float]  # Left, top, width, height, in pixels.


class Limits(NamedTuple):
    """Which pictures are used, by their headers.

    Attributes:
      min_side: pixels of the shorter side.
      max_aspect: longer side by shorter side.
      max_pixels: beyond which it must be a decompression bomb.
    """

    min_side: int = 1
    max_aspect: float = math.inf
    max_pixels: int = 2**26

    def check(self, width: int, height: int, where: str) -> None:
        """Raise BadRecord for a picture that is too_large, too_small, or whose aspect is too long."""
        found = f"found {width} x {height}"
        if width * height > self.max_pixels:
            raise BadRecord("too_large", where, f"expected at most {self.max_pixels:,} pixels, {found}")
        shorter, longer = sorted((width, height))
        if shorter < max(self.min_side, 1):
            raise BadRecord("too_small", where, f"expected sides of at least {self.min_side} pixels, {found}")
        if longer > self.max_aspect * shorter:
            raise BadRecord("aspect", where, f"expected sides within 1 : {self.max_aspect:g}, {found}")


LENIENT = Limits()


class Picture:
    """An encoded picture whose header is read and within limits; pixels are decoded when they are asked for.

    Attributes:
      width, height: in pixels.
    """

    def __init__(self, encoded: bytes, where: str = "image", limits: Limits = LENIENT):
        """Read the header.

        Args:
          encoded: JPEG, PNG, WebP and others.
          where: its name in errors.
          limits: of its size.

        Raises:
          BadRecord: it is not such a picture, as far as the header tells.
        """
        self._decoder = open_decoder(encoded, where)
        self.width, self.height = self._decoder.width, self._decoder.height
        limits.check(self.width, self.height, where)
        self._pixels: np.ndarray | None = None

    def load(self) -> np.ndarray:
        """All pixels, kept from now on: uint8[H, W, 3]. What is transparent is white; raises BadRecord."""
        if self._pixels is None:
            self._pixels, _ = self._decoder.decode(reduction=1)
        return self._pixels

    def __array__(self, dtype: np.typing.DTypeLike = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.load(), dtype, copy=copy)

    def square(self, box: Box, size: int) -> np.ndarray:
        """A part of the picture, resized: uint8[S, S, 3]. Raises BadRecord where pixels cannot be decoded."""
        if self._pixels is None:
            spare = max(1, min(box[2], box[3]) / (MARGIN * size))
            pixels, reduction = self._decoder.decode(max(ratio for ratio in REDUCTIONS if ratio <= spare))
        else:
            pixels, reduction = self._pixels, 1
        return resample(pixels, tuple(number / reduction for number in box), size)


def decode(encoded: bytes, where: str = "image", limits: Limits = LENIENT) -> Picture:
    """A picture with all its pixels decoded, so that nothing about it can still turn out to be wrong.

    Raises:
      BadRecord: it cannot be used, and why.
    """
    picture = Picture(encoded, where, limits)
    picture.load()
    return picture


def resize(picture: Picture, size: int, how: str = "squeeze") -> np.ndarray:
    """A picture as evaluation sees it: uint8[S, S, 3].

    Args:
      size: S.
      how: "squeeze" the whole into the square, as the original does, or cut the largest square from the "centre".
    """
    if how == "squeeze":
        return picture.square((0, 0, picture.width, picture.height), size)
    if how == "centre":
        side = min(picture.width, picture.height)
        return picture.square(((picture.width - side) / 2, (picture.height - side) / 2, side, side), size)
    raise ValueError(f"how to resize: expected squeeze or centre, found {how!r}")


def random_resized_crop(
    picture: Picture, size: int, rng: np.random.Generator, min_scale: float, flip: bool
) -> np.ndarray:
    """A random part of the picture, resized to a square: uint8[S, S, 3].

    Args:
      size: S.
      rng: of which everything is a function.
      min_scale: smallest share of the area; the largest is 1.
      flip: mirror every second picture, at random.
    """
    array = picture.square(random_box(picture.width, picture.height, rng, min_scale), size)
    return _mirrored(array) if flip and rng.random() < 0.5 else array


def _mirrored(array: np.ndarray) -> np.ndarray:
    """Left for right; numpy copies bytes of a channel three times as fast as pixels of three bytes."""
    mirrored = np.empty_like(array)
    for channel in range(3):
        mirrored[..., channel] = array[:, ::-1, channel]
    return mirrored


def random_box(width: int, height: int, rng: np.random.Generator, min_scale: float) -> Box:
    """Where torchvision's RandomResizedCrop would cut, in whole pixels: share of the area and log of the ratio even.

    When ten draws do not fit, as in long pictures, it is the largest part from the centre with a ratio in bounds.
    """
    smallest, largest = _RATIOS
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(min_scale, 1.0)
        ratio = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, top = rng.integers(width - box_width + 1), rng.integers(height - box_height + 1)
            return int(left), int(top), box_width, box_height
    box_width, box_height = min(width, round(height * largest)), min(height, round(width / smallest))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height


def resample(pixels: np.ndarray, box: Box, size: int) -> np.ndarray:
    """The bicubic filter of Pillow over a box of uint8[h, w, 3], which sees nothing outside: uint8[S, S, 3]."""
    left, top, width, height = box
    x, y = math.floor(left), math.floor(top)
    pixels = pixels[y : math.ceil(top + height), x : math.ceil(left + width)]
    left, top = left - x, top - y
    if cykooz_resizer is None:
        box = (left, top, left + width, top + height)
        return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box))
    rgb = cykooz_resizer.PixelType.U8x3
    source = cykooz_resizer.ImageData(pixels.shape[1], pixels.shape[0], rgb, pixels.tobytes())
    target = cykooz_resizer.ImageData(size, size, rgb)
    bicubic = cykooz_resizer.ResizeAlg.convolution(cykooz_resizer.FilterType.catmull_rom)
    crop = cykooz_resizer.CropBox(left, top, width, height)
    options = cykooz_resizer.ResizeOptions(resize_alg=bicubic, crop_box=crop, use_alpha=False)
    cykooz_resizer.Resizer().resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(size, size, 3)
