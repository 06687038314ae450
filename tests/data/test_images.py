"""Pictures: those that cannot be used are told apart, the others come out as Pillow and torchvision would have them."""

import concurrent.futures
import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from blip2_jax.data import images
from blip2_jax.data.images import Limits
from blip2_jax.data.records import BadRecord


def noise(width=64, height=48, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)


def photo(width, height, seed=0):
    """Smooth and rough parts, edges and grain: the sum of noise at all scales."""
    rng = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128.0)
    for step in (2, 4, 8, 16, 32, 64, 128):
        coarse = rng.normal(0, 3 * step**0.6, (height // step + 2, width // step + 2, 3))
        coarse = 0.7 * coarse.mean(2, keepdims=True) + 0.3 * coarse
        total += np.kron(coarse, np.ones((step, step, 1)))[:height, :width]
    return np.clip(total + rng.normal(0, 2, total.shape), 0, 255).astype(np.uint8)


def encode(array, name="JPEG", mode="RGB", **options):
    stream = io.BytesIO()
    Image.fromarray(array).convert(mode).save(stream, name, **options)
    return stream.getvalue()


def save(image, name, **options):
    stream = io.BytesIO()
    image.save(stream, name, **options)
    return stream.getvalue()


def patched(data, place, new):
    return data[:place] + new + data[place + len(new) :]


def patched_png(data, place, new):
    """A change in the header of a PNG, with the checksum that belongs to it."""
    data = patched(data, place, new)
    return patched(data, 29, struct.pack(">I", zlib.crc32(data[12:29])))


def frames(name):
    first, *others = [Image.fromarray(noise(seed=seed)).convert("P" if name == "GIF" else "RGB") for seed in range(3)]
    return save(first, name, save_all=True, append_images=others)


JPEG, PNG, WEBP = encode(noise()), encode(noise(), "PNG"), encode(noise(), "WEBP")
HALF = JPEG[: len(JPEG) // 2]
PROGRESSIVE = encode(noise(), progressive=True)
SIZE = JPEG.index(b"\xff\xc0") + 5  # Where the header has the height; the precision stands before it.
SCAN = JPEG.index(b"\xff\xda") + 14
DEEP_RGB = patched_png(PNG, 24, b"\x10")  # The bit depth of the header.
BROKEN = patched(JPEG, SCAN + 200, b"\xff\xd8" * 4)

BAD = {
    "no bytes": (b"", "missing"),
    "a text": (b"hello", "unreadable"),
    "a page in place of a JPEG": (b"\xff\xd8\xff<html>" * 20, "unreadable"),
    "a JPEG with wrong bytes": (BROKEN, "unreadable"),
    "a PNG with wrong bytes": (patched(PNG, len(PNG) // 2, b"\0" * 40), "unreadable"),
    "half a JPEG": (HALF, "truncated"),
    "half a JPEG that claims to end": (HALF + b"\xff\xd9", "truncated"),
    "half a progressive JPEG": (PROGRESSIVE[: len(PROGRESSIVE) // 2], "truncated"),
    "a JPEG's header": (JPEG[:SCAN], "truncated"),
    "a part of a JPEG's header": (JPEG[:100], "truncated"),
    "half a PNG": (PNG[: len(PNG) // 2], "truncated"),
    "half a WebP": (WEBP[: len(WEBP) // 2], "truncated"),
    "a GIF that ends early": (encode(noise(), "GIF")[:-500], "truncated"),
    "a JPEG in CMYK": (encode(noise(), mode="CMYK"), "cmyk"),
    "a TIFF in CMYK": (encode(noise(), "TIFF", mode="CMYK"), "cmyk"),
    "a PNG of 16 bits": (save(Image.fromarray(np.zeros((9, 9), np.uint16)), "PNG"), "deep"),
    "a PNG of 16 bits in colour": (DEEP_RGB, "deep"),
    "a TIFF of 16 bits": (save(Image.fromarray(np.zeros((9, 9), np.uint16)), "TIFF"), "deep"),
    "a TIFF in floating point": (save(Image.fromarray(np.zeros((9, 9), np.float32)), "TIFF"), "deep"),
    "a JPEG of 12 bits": (patched(JPEG, SIZE - 1, b"\x0c"), "deep"),
    "an animated GIF": (frames("GIF"), "animated"),
    "an animated WebP": (frames("WEBP"), "animated"),
    "an animated PNG": (frames("PNG"), "animated"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_and_why(name):
    encoded, reason = BAD[name]
    with pytest.raises(BadRecord, match=r"^holiday: ") as caught:
        images.decode(encoded, "holiday")
    assert caught.value.reason == reason, caught.value


@pytest.mark.parametrize("name", BAD)
def test_a_crop_of_a_part_notices_it_too(name):
    encoded, reason = BAD[name]
    with pytest.raises(BadRecord) as caught:
        images.Picture(encoded).square((0, 0, 1, 1), 2)
    assert caught.value.reason == reason, caught.value


def test_adobes_form_of_cmyk():
    """YCCK: as Photoshop writes it, with the transform named in the header."""
    data = encode(noise(), mode="CMYK")
    adobe = data.index(b"Adobe") + 11
    assert simplejpeg.decode_jpeg_header(patched(data, adobe, b"\x02"))[2] == "YCCK"
    with pytest.raises(BadRecord, match="YCCK"):
        images.decode(patched(data, adobe, b"\x02"))


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [(10, 40, "too_small"), (40, 10, "too_small"), (20, 81, "aspect"), (81, 20, "aspect")],
)
@pytest.mark.parametrize("name", ["JPEG", "PNG"])
def test_limits_of_size(width, height, reason, name):
    limits = Limits(min_side=20, max_aspect=4)
    with pytest.raises(BadRecord, match=f"found {width} x {height}") as caught:
        images.Picture(encode(noise(width, height), name), limits=limits)
    assert caught.value.reason == reason
    images.Picture(encode(noise(20, 80), name), limits=limits)


def test_a_decompression_bomb_is_never_decoded(monkeypatch):
    """60,000 x 60,000 by the header alone; for Pillow that is past its own limit too."""
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    size = struct.pack(">II", 60000, 60000)
    for data in (patched(JPEG, SIZE, struct.pack(">HH", 60000, 60000)), patched_png(PNG, 16, size)):
        with pytest.raises(BadRecord) as caught:
            images.decode(data)
        assert caught.value.reason == "too_large"
    with pytest.raises(BadRecord, match="at most 3,071 pixels, found 64 x 48"):
        images.Picture(PNG, limits=Limits(max_pixels=64 * 48 - 1))


def test_transparency_becomes_white_and_all_modes_become_rgb():
    for mode, colour in (("RGBA", (255, 0, 0, 0)), ("LA", (0, 0)), ("P", 0), ("L", 255), ("1", 1)):
        options = {"transparency": 0} if mode == "P" else {}
        data = save(Image.new(mode, (3, 3), colour), "PNG", **options)
        assert np.asarray(images.decode(data)).tolist() == np.full((3, 3, 3), 255).tolist(), mode
    half = images.decode(save(Image.new("RGBA", (3, 3), (255, 0, 0, 128)), "PNG"))
    assert np.asarray(half)[0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize("name", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_formats(name):
    data = encode(noise(), name)
    np.testing.assert_array_equal(images.decode(data), Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"mode": "L"}, {"quality": 30, "optimize": True}]
)
def test_jpegs_are_decoded_as_pillow_does(options):
    data = encode(noise(), **options)
    np.testing.assert_array_equal(images.decode(data), Image.open(io.BytesIO(data)).convert("RGB"))


def test_harmless_oddities_of_jpegs():
    """Bytes too many, settings of a scan that mean nothing, a sampling of colours without a name, a second picture."""
    whole = np.asarray(images.decode(JPEG))
    second = save(Image.fromarray(noise()), "MPO", save_all=True, append_images=[Image.fromarray(noise())])
    odd = {
        "before the end": JPEG[:-2] + b"\x12\x34" + JPEG[-2:],
        "after the end": JPEG + b"camera" * 9,
        "scan": patched(JPEG, SCAN - 3, b"\0\0\0"),
    }
    for name, data in odd.items():
        np.testing.assert_array_equal(images.decode(data), whole, name)
    assert np.asarray(images.decode(second)).shape == (48, 64, 3)
    rare = patched(encode(noise(), subsampling=1), SIZE + 6, b"\x31")
    with pytest.raises(ValueError, match="subsampling"):
        simplejpeg.decode_jpeg_header(rare)
    assert images.Picture(rare).width == 64


def test_the_orientation_of_exif_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(images.decode(encode(noise(), exif=exif)), images.decode(JPEG))


def pillow_square(data, box, size):
    left, top, width, height = box
    part = Image.open(io.BytesIO(data)).convert("RGB").crop((left, top, left + width, top + height))
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC)).astype(int)


@pytest.mark.parametrize("name", ["JPEG", "PNG"])
@pytest.mark.parametrize("box", [(0, 0, 320, 240), (30, 11, 200, 190), (300, 200, 20, 30)])
def test_resizing_is_pillows_bicubic(name, box):
    data = encode(photo(320, 240), name)
    difference = np.abs(images.Picture(data).square(box, 64) - pillow_square(data, box, 64))
    assert difference.max() <= 3
    assert difference.mean() < 0.3


def test_resizing_by_pillow_itself(monkeypatch):
    data, box = encode(photo(320, 240)), (30, 11, 200, 190)
    monkeypatch.setattr(images, "cykooz_resizer", None)
    np.testing.assert_array_equal(images.Picture(data).square(box, 64), pillow_square(data, box, 64))


@pytest.mark.parametrize(("side", "reduction"), [(255, 1), (256, 2), (511, 2), (512, 4), (1024, 8)])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(side, reduction, monkeypatch):
    data, box, shapes = encode(photo(1101, 1050), quality=90), (5, 9, side + 50, side), []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: (shapes.append(r := decode(*a, **k)), r)[1])
    difference = np.abs(images.Picture(data).square(box, 64) - pillow_square(data, box, 64))
    assert shapes[0].shape == (-(-1050 // reduction), -(-1101 // reduction), 3)
    assert difference.mean() < 1.2
    assert np.sqrt(np.mean(difference**2)) < 1.8
    assert difference.max() <= 20


def test_a_picture_that_is_decoded_is_not_decoded_again(monkeypatch):
    picture = images.decode(encode(photo(1100, 1050)))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded"))
    assert images.resize(picture, 32).shape == (32, 32, 3)


def test_evaluation_squeezes_or_cuts_the_centre():
    array = np.zeros((20, 60, 3), np.uint8)
    array[:, 20:40] = 200
    data = encode(array, "PNG")
    assert (images.resize(images.decode(data), 10, "centre") == 200).all()
    squeezed = images.resize(images.decode(data), 12)
    assert squeezed.shape == (12, 12, 3)
    assert (squeezed[:, 0] == 0).all()
    assert (squeezed[:, 6] > 190).all()
    with pytest.raises(ValueError, match="expected squeeze or centre, found 'crop'"):
        images.resize(images.decode(data), 12, "crop")


def test_a_crop_is_a_function_of_the_generator():
    picture = images.Picture(encode(photo(320, 240)))
    crop = lambda seed: images.random_resized_crop(picture, 16, np.random.default_rng(seed), 0.5, True)
    np.testing.assert_array_equal(crop(3), crop(3))
    assert (crop(3) != crop(4)).any()


def test_threads_do_not_disturb_one_another():
    encoded = [encode(photo(200 + seed, 150, seed), name) for seed in range(8) for name in ("JPEG", "PNG")]

    def crop(number):
        rng = np.random.default_rng(number)
        return images.random_resized_crop(images.Picture(encoded[number % 16]), 32, rng, 0.5, True)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        np.testing.assert_array_equal(list(pool.map(crop, range(160))), [crop(number) for number in range(160)])


def test_crops_are_distributed_as_torchvisions():
    """Shares, ratios and places, by quantiles: of ten draws in one go those are kept that torchvision keeps."""
    width, height, count = 640, 480, 4000
    boxes = np.array([images.random_box(width, height, np.random.default_rng(seed), 0.5) for seed in range(count)])
    rng = np.random.default_rng(0)
    area = width * height * rng.uniform(0.5, 1, (count, 10))
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), (count, 10)))
    size = np.stack([np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))], -1)
    fits = (size <= [width, height]).all(-1)
    expected = size[np.arange(count), fits.argmax(1)][fits.any(1)]
    for quantile in (0.02, 0.25, 0.5, 0.75, 0.98):
        np.testing.assert_allclose(np.quantile(boxes[:, 2:], quantile, 0), np.quantile(expected, quantile, 0), atol=6)
    room = np.array([width, height]) - boxes[:, 2:]
    assert (boxes[:, :2] <= room).all()
    assert (boxes[:, :2] >= 0).all()
    places = (boxes[:, :2] + 0.5) / (room + 1)
    np.testing.assert_allclose(np.quantile(places, [0.1, 0.5, 0.9], 0), [[0.1] * 2, [0.5] * 2, [0.9] * 2], atol=0.03)


@pytest.mark.parametrize(("size", "box"), [((300, 30), (130, 0, 40, 30)), ((30, 300), (0, 130, 30, 40))])
def test_of_a_long_picture_the_centre(size, box):
    assert images.random_box(*size, np.random.default_rng(0), 0.9) == box


def test_a_mirrored_crop():
    picture = images.Picture(encode(np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (60, 1, 3)), "PNG"))
    crops = [images.random_resized_crop(picture, 16, np.random.default_rng(i), 1.0, True)[0] for i in range(200)]
    mirrored = np.mean([int(crop[0, 0]) > int(crop[-1, 0]) for crop in crops])
    assert 0.4 < mirrored < 0.6
