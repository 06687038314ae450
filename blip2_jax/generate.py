"""Write about pictures: captions, answers to questions, or what continues a prompt.

    python -m blip2_jax.generate --checkpoint DIR --image FILE... [--prompt TEXT | --question TEXT] [--num_beams 5 ...]
    python -m blip2_jax.generate --checkpoint DIR --image FILE --interactive

DIR is a workdir, one of its checkpoints/STEP, or a directory of transformers (BLIP-2, InstructBLIP); hf:ORG/NAME is
looked for in the hub's cache. Prints one line a picture, in the order given: its path, a tab, the text, or several with
tabs between them. All else goes to stderr. A picture that cannot be read has an empty text, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from blip2_jax import api
from blip2_jax.decoding import GenerationConfig
from blip2_jax.decoding.settings import CONVENTIONS
from blip2_jax.evaluation import attention


def write(
    model: api.Blip2,
    files: Sequence[pathlib.Path],
    config: GenerationConfig,
    prompt: str | None = None,
    question: str | None = None,
    seed: int = 0,
) -> list[list[str]]:
    """The texts of each picture; none of one that cannot be read, which is told on stderr.

    Args:
      model: of `api.load`.
      files: of the pictures.
      config: how texts are written.
      prompt: what they continue; None: what captions were trained with.
      question: asked of every picture, instead of a prompt.
      seed: of what is drawn.

    Raises:
      ValueError: no picture can be read, or the model cannot do what is asked.
    """
    pictures, size = {}, model.task.config.image_size
    for number, file in enumerate(files):
        try:
            pictures[number] = api.seen(file, size)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
    if not pictures:
        raise ValueError(f"none of {len(files)} pictures can be read")
    readable = list(pictures.values())
    if question is None:
        found = model.caption(readable, config, prompt, seed)
    else:
        found = model.answer(readable, [question] * len(readable), config, seed)
    texts = dict(zip(pictures, found, strict=True))
    rows = [texts.get(number, []) for number in range(len(files))]
    return [[row] if isinstance(row, str) else row for row in rows]


def draw_attention(model: api.Blip2, files: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
    """A PNG for each picture that can be read: where the queries look in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files):
        try:
            picture = api.seen(file, model.task.config.image_size)
        except (OSError, ValueError):
            continue
        (weights,) = model.attention([picture])
        output = folder / f"{number:03d}_{file.stem}.png"
        attention.overlay(picture, weights).save(output)
        print(f"wrote {output}", file=sys.stderr)


def converse(model: api.Blip2, file: pathlib.Path, config: GenerationConfig) -> None:
    """Questions line by line from stdin, answers on stdout; the end of the input ends it."""
    dialogue = model.chat(file, config)
    while True:
        try:
            question = input("question: " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if question.strip():
            try:
                print(" ".join(dialogue.ask(question).split()), flush=True)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a workdir, one of its checkpoints, or hf:DIR")
    parser.add_argument("--image", required=True, nargs="+", type=pathlib.Path, help="picture files")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--prompt", help="what the text continues; by default what captions were trained with")
    texts.add_argument("--question", help="asked as the recipe asks questions")
    texts.add_argument("--interactive", action="store_true", help="questions about one picture, line by line")
    parser.add_argument("--attention", type=pathlib.Path, metavar="DIR", help="draw where the queries look, as PNG")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn with a temperature")
    kinds = {"int": int, "float": float, "str": str}
    for field in dataclasses.fields(GenerationConfig):
        if field.name == "early_stopping":
            parser.add_argument("--early_stopping", choices=("True", "False", "never"))
        elif field.name == "convention":
            parser.add_argument("--convention", choices=CONVENTIONS, help="of beam scores")
        else:
            parser.add_argument(f"--{field.name}", type=kinds[field.type])
    return parser.parse_args(arguments)


def settings(options: argparse.Namespace) -> GenerationConfig:
    """What the options ask for, on top of what the paper does for captions or answers."""
    base = api.CAPTION if options.question is None and not options.interactive else api.ANSWER
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(GenerationConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    if "early_stopping" in given:
        given["early_stopping"] = {"True": True, "False": False}.get(given["early_stopping"], "never")
    if given.get("temperature") and "num_beams" not in given:
        given["num_beams"] = 1
    return dataclasses.replace(base, **given)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _arguments(arguments)
    try:
        config, model = settings(options), api.load(options.checkpoint)
        _check(model, options)
        if options.interactive:
            converse(model, options.image[0], config)
            return
        texts = write(model, options.image, config, options.prompt, options.question, options.seed)
        if options.attention:
            draw_attention(model, options.image, options.attention)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for file, row in zip(options.image, texts, strict=True):
        print("\t".join([str(file), *(" ".join(text.split()) for text in row or [""])]))
    if not all(texts):
        sys.exit(1)


def _check(model: api.Blip2, options: argparse.Namespace) -> None:
    if options.interactive and len(options.image) > 1:
        raise ValueError(f"--interactive is about one picture, found {len(options.image)}")
    own = model.task.config.data.get("prompt", "")
    for name in ("prompt", "question"):
        text = getattr(options, name)
        if text is not None and not text.strip() and (own or name == "question"):
            raise ValueError(f"--{name} is empty: leave it out for a caption behind the recipe's own prompt {own!r}")


if __name__ == "__main__":
    main()
