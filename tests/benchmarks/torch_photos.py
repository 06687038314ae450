"""The other side of the loader's benchmark: photos through a torch DataLoader, with torchvision's transforms on Pillow.

The transforms are written out here as torchvision has them, step by step, so that torch alone is needed.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _crop(width: int, height: int, min_scale: float) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params: left, top, right, bottom."""
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(min_scale, 1.0).item()
        ratio = torch.exp(torch.empty(1).uniform_(math.log(3 / 4), math.log(4 / 3))).item()
        cut_width, cut_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < cut_width <= width and 0 < cut_height <= height:
            top = torch.randint(0, height - cut_height + 1, (1,)).item()
            left = torch.randint(0, width - cut_width + 1, (1,)).item()
            return left, top, left + cut_width, top + cut_height
    return 0, 0, width, height  # The photos are within 3/4 to 4/3.


class Photos(torch.utils.data.Dataset):
    """A folder of JPEGs: uint8[3, S, S], or float32 as the original makes it on the host."""

    def __init__(self, folder: pathlib.Path, size: int, min_scale: float, normalise: bool):
        self._files, self._size, self._min_scale = sorted(folder.glob("*.jpg")), size, min_scale
        self._normalise = normalise
        self._mean, self._std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = Image.open(self._files[index]).convert("RGB")
        image = image.crop(_crop(*image.size, self._min_scale))
        image = image.resize((self._size, self._size), Image.Resampling.BICUBIC)
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1)
        if not self._normalise:
            return tensor
        return tensor.contiguous().to(torch.float32).div(255).sub_(self._mean).div_(self._std)


def batches(
    folder: pathlib.Path, size: int, min_scale: float, normalise: bool, batch_size: int, workers: int
) -> Iterator[torch.Tensor]:
    """Endless batches, shuffled."""
    photos = Photos(folder, size, min_scale, normalise)
    sampler = torch.utils.data.RandomSampler(photos, replacement=True, num_samples=2**40)
    # Workers are spawned, since jax is here too and has threads; each computes with one thread, as is torch's rule.
    loader = torch.utils.data.DataLoader(
        photos, batch_size, sampler=sampler, num_workers=workers, multiprocessing_context="spawn", drop_last=True
    )
    return iter(loader)
