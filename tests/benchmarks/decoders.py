"""Decoders and resizers beside one another: python -m tests.benchmarks.decoders [--photos 16] [--rounds 15]

Milliseconds of processor time a picture (all threads together; the median of the rounds) and how far the result is from
Pillow's. What is not installed is left out; none of it but Pillow, simplejpeg and cykooz-resizer is needed elsewhere.
Results are in NOTES.md.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL
import simplejpeg
from PIL import Image

from blip2_jax.data import images
from tests.benchmarks.photos import jpeg, photo
from tests.benchmarks.tables import markdown

SIZE = 224
BICUBIC = Image.Resampling.BICUBIC
Way = Callable[[Any], Any]


def _open(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


def _draft(encoded: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(encoded))
    image.draft("RGB", (image.width // 2, image.height // 2))
    return np.asarray(image)


def _simplejpeg(eighths: int = 8, **options: bool) -> Way:
    def decode(encoded: bytes) -> np.ndarray:
        height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
        smallest = {"min_height": -(-height * eighths // 8), "min_width": -(-width * eighths // 8)}
        return simplejpeg.decode_jpeg(encoded, **smallest, **options)

    return decode


def decoders() -> Iterator[tuple[str, Way]]:
    """From encoded bytes to an array."""
    yield f"Pillow {PIL.__version__}", lambda encoded: np.asarray(_open(encoded))
    yield "Pillow, draft 1/2", _draft
    yield f"simplejpeg {simplejpeg.__version__}", _simplejpeg()
    yield "simplejpeg, fastupsample", _simplejpeg(fastupsample=True)
    yield "simplejpeg, fastdct, fastupsample", _simplejpeg(fastdct=True, fastupsample=True)
    for eighths in (7, 6, 5, 4, 2, 1):
        yield f"simplejpeg, {eighths}/8", _simplejpeg(eighths)
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)
        for name, flag in (("", cv2.IMREAD_COLOR_RGB), (", reduced 1/2", cv2.IMREAD_REDUCED_COLOR_2)):
            decode = lambda encoded, flag=flag: cv2.imdecode(np.frombuffer(encoded, np.uint8), flag)
            yield f"OpenCV {cv2.__version__}{name}", decode
    with contextlib.suppress(ImportError, RuntimeError):  # It needs a libturbojpeg of the system.
        import turbojpeg

        reader = turbojpeg.TurboJPEG()
        yield (
            f"PyTurboJPEG {turbojpeg.__version__}",
            lambda encoded: reader.decode(encoded, pixel_format=turbojpeg.TJPF_RGB),
        )
    with contextlib.suppress(ImportError):
        import imagecodecs

        yield f"imagecodecs {imagecodecs.__version__}", imagecodecs.jpeg8_decode


def resizers(box: tuple[int, int, int, int]) -> Iterator[tuple[str, Way]]:
    """From an array to a part of it, uint8[S, S, 3]."""
    left, top, width, height = box
    cut = lambda array: array[top : top + height, left : left + width]
    by_pillow = lambda array, **options: np.asarray(Image.fromarray(array).resize((SIZE, SIZE), BICUBIC, **options))
    corners = (left, top, left + width, top + height)
    yield f"Pillow {PIL.__version__}", lambda array: by_pillow(cut(array))
    yield "Pillow, box=", lambda array: by_pillow(array, box=corners)
    for gap in (2.0, 1.0):
        yield f"Pillow, reducing_gap={gap:g}", lambda array, gap=gap: by_pillow(array, box=corners, reducing_gap=gap)
    yield "cykooz-resizer (images.py)", lambda array: images.resample(array, box, SIZE)
    with contextlib.suppress(ImportError):
        import kornia_rs

        yield (
            f"kornia-rs {kornia_rs.__version__}",
            lambda array: kornia_rs.imgproc.resize(
                np.ascontiguousarray(cut(array)), (SIZE, SIZE), "bicubic", antialias=True
            ),
        )
    with contextlib.suppress(ImportError):
        import cv2

        for name, how in (("area", cv2.INTER_AREA), ("cubic, not antialiased", cv2.INTER_CUBIC)):
            yield (
                f"OpenCV {cv2.__version__}, {name}",
                lambda array, how=how: cv2.resize(cut(array), (SIZE, SIZE), interpolation=how),
            )
    with contextlib.suppress(ImportError):
        import torch

        def by_torch(array: np.ndarray) -> np.ndarray:
            channels = torch.from_numpy(cut(array)).permute(2, 0, 1)[None]
            resized = torch.nn.functional.interpolate(channels, (SIZE, SIZE), mode="bicubic", antialias=True)
            return resized[0].permute(1, 2, 0).numpy()

        torch.set_num_threads(1)
        yield f"torch {torch.__version__}, interpolate", by_torch


def both(box: tuple[int, int, int, int]) -> Iterator[tuple[str, Way]]:
    """From encoded bytes to uint8[S, S, 3]."""
    left, top, width, height = box
    corners = (left, top, left + width, top + height)
    yield (
        "Pillow, as torchvision",
        lambda encoded: np.asarray(_open(encoded).crop(corners).resize((SIZE, SIZE), BICUBIC)),
    )
    yield "images.Picture", lambda encoded: images.Picture(encoded).square(box, SIZE)


def table(title: str, ways: Iterator[tuple[str, Way]], items: Sequence[Any], rounds: int) -> str:
    """A row for each way; the first one is the measure of the others."""
    rows, reference = [[title, "ms", "mean difference", "largest"]], None
    for name, way in ways:
        found = [np.asarray(way(item)).astype(int) for item in items]
        reference = found if reference is None else reference
        seconds = []
        for _ in range(rounds):
            start = time.process_time()
            for item in items:
                way(item)
            seconds.append((time.process_time() - start) / len(items))
        apart = ["", ""]
        if found[0].shape == reference[0].shape:
            differences = [np.abs(one - other) for one, other in zip(found, reference, strict=True)]
            apart = [f"{np.mean([d.mean() for d in differences]):.2f}", str(max(d.max() for d in differences))]
        rows.append([name, f"{1000 * statistics.median(seconds):.2f}", *apart])
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    for width, height, count, box in (
        (640, 480, options.photos, (60, 0, 490, 460)),
        (2048, 1536, max(options.photos // 4, 1), (200, 96, 1600, 1400)),
    ):
        arrays = [photo(seed, width, height, width * height // 1024) for seed in range(count)]
        encoded = [jpeg(array) for array in arrays]
        size = f"{width} x {height}, {np.mean([len(data) for data in encoded]) / 1000:.0f} kB"
        print(table(f"decoding {size}", decoders(), encoded, options.rounds), "\n")
        print(table(f"resizing {box[2]} x {box[3]} to {SIZE}", resizers(box), arrays, options.rounds), "\n")
        print(table(f"both, {size}", both(box), encoded, options.rounds), "\n")


if __name__ == "__main__":
    main()
