"""Write a text for pictures: python -m blip2_jax.generate --checkpoint DIR --image FILE [--prompt TEXT]

Prints one line a picture, in the order given: its path, a tab, the text. All else goes to stderr.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from blip2_jax import tasks
from blip2_jax.data import images
from blip2_jax.decoding import GenerationConfig
from blip2_jax.tasks.stage2 import Stage2


def load_pictures(files: Sequence[pathlib.Path], size: int) -> np.ndarray:
    """uint8[B, S, S, 3].

    Raises:
      OSError, ValueError: a file is missing or not a picture.
    """
    return np.stack([images.resize(images.decode(file.read_bytes(), str(file)), size) for file in files])


def generate(
    checkpoint: str, files: Sequence[pathlib.Path], prompt: str | None = None, max_new_tokens: int = 20
) -> list[str]:
    """A greedy text for each picture, behind the prompt (by default the one that captions were trained with)."""
    task, trainable = tasks.load_trained(checkpoint)
    if not isinstance(task, Stage2):
        raise ValueError(
            f"{checkpoint} is a checkpoint of {task.name}; only stage 2 has a language model to write with"
        )
    pictures = load_pictures(files, task.config.image_size)
    soft_prompt = np.asarray(task.soft_prompt(trainable, task.encode(pictures)))
    prompts = [task.config.data.prompt if prompt is None else prompt] * len(files)
    return task.generate(soft_prompt, prompts, GenerationConfig(max_new_tokens))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a stage-2 workdir, or one of its checkpoints/STEP")
    parser.add_argument("--image", required=True, nargs="+", type=pathlib.Path, help="picture files")
    parser.add_argument("--prompt", help="what the text continues, such as a question")
    parser.add_argument("--max_new_tokens", type=int, default=20)
    options = parser.parse_args(arguments)
    try:
        texts = generate(options.checkpoint, options.image, options.prompt, options.max_new_tokens)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for file, text in zip(options.image, texts, strict=True):
        print(f"{file}\t{' '.join(text.split())}")


if __name__ == "__main__":
    main()
