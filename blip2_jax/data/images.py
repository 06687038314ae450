"""Decoding, augmenting and resizing pictures, as uint8 arrays; normalisation happens on the device."""

from __future__ import annotations

import io
import pathlib

import numpy as np
from PIL import Image, UnidentifiedImageError


def _reason(error: Exception) -> str:
    return "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)


def check_image(file: pathlib.Path) -> None:
    """Raise ValueError if a file is not a picture that Pillow can read; only its header is looked at."""
    try:
        with Image.open(file) as image:
            image.verify()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{file} is not a picture that can be read ({_reason(error)})") from error


def decode(encoded: bytes, where: str = "image") -> Image.Image:
    """An RGB picture; what is transparent becomes white."""
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{where} is not a picture that can be read ({_reason(error)})") from error
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image)
        image = canvas
    return image.convert("RGB")


def resize(image: Image.Image, size: int) -> np.ndarray:
    """The whole picture squeezed into a square, bicubic: uint8[S, S, 3]. How the original evaluates."""
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def random_resized_crop(
    image: Image.Image, size: int, rng: np.random.Generator, min_scale: float, flip: bool
) -> np.ndarray:
    """A random part of the picture, resized to a square, bicubic: uint8[S, S, 3].

    Args:
      size: S.
      min_scale: smallest share of the area; the largest is 1. Aspect ratios lie between 3/4 and 4/3.
      flip: mirror every second picture, at random.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(min_scale, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        crop_width, crop_height = np.sqrt(area * ratio), np.sqrt(area / ratio)
        if crop_width <= width and crop_height <= height:
            break
    else:
        crop_width = crop_height = min(width, height)
    left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
    box = (left, top, left + crop_width, top + crop_height)
    array = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return array[:, ::-1] if flip and rng.random() < 0.5 else array
