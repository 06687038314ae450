"""What ITC with its gradient, and the drawing of hard negatives, take for global batches from 256 to 16,384.

python -m tests.benchmarks.objectives_memory [--time] [--picture FILE.png]

On 8 fake devices, at 32 queries and a projection to 256: temporary bytes a device, by the compiler's own account, in
blocks of 128 captions and, for contrast, in one block of everything. With --time also seconds up to a batch of 4,096,
of the objectives alone and behind a toy Q-Former with its own gradient; the fake devices share this machine's cores.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from blip2_jax.objectives import contrastive, matching
from blip2_jax.parallel.mesh import make_mesh
from tests.benchmarks.tables import markdown

DEVICES, QUERIES, WIDTH, BLOCK = 8, 32, 256, 128
BATCHES = tuple(2**n for n in range(8, 15))
TIMED = 4096  # The largest batch that is run.
TOKENS, MODEL = 16, 128  # Of the toy's images, and its width.

Curves = Mapping[str, Sequence[tuple[int, float]]]


def itc(images: jax.Array, texts: jax.Array, pairs: contrastive.Pairs, block: int) -> Any:
    """Value and gradients by features and temperature."""
    loss = lambda *x: contrastive.contrastive_loss(*x, pairs, block=block)
    return jax.value_and_grad(loss, (0, 1, 2))(images, texts, jnp.float32(0.07))


def negatives(images: jax.Array, texts: jax.Array, pairs: contrastive.Pairs, block: int) -> Any:
    return matching.hard_negatives(jax.random.key(0), images, texts, jnp.float32(0.07), pairs, block=block)


def inputs(batch: int) -> tuple[Any, ...]:
    """Shapes of image features, text features and pairs, rows divided over the devices."""
    rows = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(("data", "fsdp")))
    shape = lambda dtype, *size: jax.ShapeDtypeStruct(size, dtype, sharding=rows)
    ids = shape(jnp.uint32, batch, 2)
    pairs = contrastive.Pairs(ids, ids, shape(jnp.bool_, batch))
    return shape(jnp.float32, batch, QUERIES, WIDTH), shape(jnp.float32, batch, WIDTH), pairs


def temporary_bytes(function: Callable, batch: int, block: int) -> int:
    """Of one device."""
    compiled = jax.jit(function, static_argnums=3).lower(*inputs(batch), block).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def random(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape) / math.sqrt(shape[-1])


def toy_parameters() -> dict[str, jax.Array]:
    keys = iter(jax.random.split(jax.random.key(0), 8))
    layers = {name: random(next(keys), MODEL, MODEL) for name in ("key", "value", "hidden", "text")}
    projections = {name: random(next(keys), MODEL, WIDTH) for name in ("image_projection", "text_projection")}
    return layers | projections | {"queries": random(next(keys), QUERIES, MODEL)}


def toy_qformer(weights: dict, tokens: jax.Array, words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries that attend to image tokens once, and a mean of words: features of images and of captions."""
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    attention = jax.nn.softmax(jnp.einsum("qd,bpd->bqp", weights["queries"], tokens @ weights["key"]))
    seen = jax.nn.gelu((attention @ (tokens @ weights["value"])) @ weights["hidden"])
    read = jax.nn.gelu(words.mean(1) @ weights["text"])
    return unit(seen @ weights["image_projection"]), unit(read @ weights["text_projection"])


def objectives_step(weights: dict, tokens: jax.Array, words: jax.Array, pairs: contrastive.Pairs) -> Any:
    """ITC's gradient through the toy, and hard negatives by its features."""

    def loss(weights: dict) -> tuple[jax.Array, Any]:
        features = toy_qformer(weights, tokens, words)
        return contrastive.contrastive_loss(*features, jnp.float32(0.07), pairs, block=BLOCK), negatives(
            *features, pairs, BLOCK
        )

    return jax.value_and_grad(loss, has_aux=True)(weights)


def seconds(function: Callable, *arguments: Any) -> float:
    """The fastest of three runs after one that compiles."""
    function = jax.jit(function)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return min(times[1:])


def measured_seconds(batch: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    rows = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(("data", "fsdp")))
    place = lambda x: jax.device_put(x, rows)
    draw = lambda *shape: place(rng.standard_normal(shape, np.float32))
    ids = place(np.stack([np.arange(batch, dtype=np.uint32)] * 2, -1))
    pairs = contrastive.Pairs(ids, ids, place(np.ones(batch, bool)))
    data = (draw(batch, TOKENS, MODEL), draw(batch, TOKENS, MODEL))
    weights = toy_parameters()
    features = jax.jit(toy_qformer)(weights, *data)
    return {
        "ITC, gradient": seconds(lambda *x: itc(*x, BLOCK), *features, pairs),
        "negatives": seconds(lambda *x: negatives(*x, BLOCK), *features, pairs),
        "both behind a toy Q-Former": seconds(objectives_step, weights, *data, pairs),
    }


def chart(title: str, unit: str, curves: Curves, size: tuple[int, int] = (560, 420)) -> Image.Image:
    """Both axes logarithmic, so that a straight line of slope 1 is linear growth; drawn large, then made smaller."""
    scale, colours = 3, ("#1a73e8", "#d93025", "#188038", "#e37400")
    width, height = (side * scale for side in size)
    left, top, right, bottom = 70 * scale, 40 * scale, width - 20 * scale, height - 110 * scale
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(12 * scale)
    points = [point for curve in curves.values() for point in curve]
    xs = [math.log2(x) for x, _ in points]
    ys = [math.log10(y) for _, y in points]
    low, high = math.floor(min(ys)), math.ceil(max(ys))
    place = lambda x, y: (
        left + (math.log2(x) - min(xs)) / (max(xs) - min(xs)) * (right - left),
        bottom - (math.log10(y) - low) / (high - low) * (bottom - top),
    )
    draw.text((left, 12 * scale), title, "#1c1e21", ImageFont.load_default(15 * scale))
    for power in range(low, high + 1):
        _, y = place(2 ** min(xs), 10.0**power)
        draw.line((left, y, right, y), "#dddddd", scale)
        draw.text((left - 6 * scale, y), f"{10.0**power:g} {unit}", "#5f6368", font, anchor="rm")
    for x in sorted({x for x, _ in points}):
        draw.text((place(x, 10.0**low)[0], bottom + 6 * scale), f"{x:,}", "#5f6368", font, anchor="mt")
    for number, (name, curve) in enumerate(curves.items()):
        colour, line = colours[number], [place(*point) for point in curve]
        draw.line(line, colour, 2 * scale, joint="curve")
        for x, y in line:
            draw.circle((x, y), 3 * scale, colour)
        draw.text((left, bottom + (26 + 18 * number) * scale), f"{name}: {curve[-1][1]:.3g} {unit}", colour, font)
    return picture.resize(size, Image.Resampling.LANCZOS)


def report(title: str, digits: int, curves: Curves) -> None:
    """As a table, one row a batch."""
    batches = sorted({batch for curve in curves.values() for batch, _ in curve})
    cell = lambda curve, batch: f"{dict(curve)[batch]:,.{digits}f}" if batch in dict(curve) else ""
    rows = [[f"{batch:,}", *(cell(curve, batch) for curve in curves.values())] for batch in batches]
    print(markdown([[title, *curves], *rows]), flush=True)


def main(timed: bool, picture: str | None) -> None:
    cases = {
        "ITC, gradient": (itc, BLOCK),
        "negatives": (negatives, BLOCK),
        "ITC in one block": (itc, max(BATCHES)),
        "negatives in one block": (negatives, max(BATCHES)),
    }
    megabytes = lambda case, batch: temporary_bytes(case[0], batch, case[1]) / 1e6
    memory = {name: [(batch, megabytes(case, batch)) for batch in BATCHES] for name, case in cases.items()}
    report("MB a device, global batch", 1, memory)
    charts = [chart("temporaries a device by global batch", "MB", memory)]
    if timed:
        runs = {batch: measured_seconds(batch) for batch in BATCHES if batch <= TIMED}
        times = {name: [(batch, run[name]) for batch, run in runs.items()] for name in runs[BATCHES[0]]}
        report("seconds, global batch", 3, times)
        charts.append(chart("time by global batch", "s", times))
    if picture:
        page = Image.new("RGB", (sum(each.width for each in charts), charts[0].height), "white")
        for number, each in enumerate(charts):
            page.paste(each, (number * each.width, 0))
        page.save(picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="also run, up to a batch of 4,096")
    parser.add_argument("--picture", metavar="FILE.png", help="draw the tables")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    with jax.set_mesh(make_mesh(f"data={DEVICES}")):
        main(options.time, options.picture)
