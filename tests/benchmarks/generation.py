"""Captions a second beside transformers, with the same random weights: python -m tests.benchmarks.generation

A BLIP-2 with a ViT 384 wide of 12 blocks at 224 px, a Q-Former 384 wide of 6 layers, and an OPT of 125 M parameters
writes 20 tokens behind a prompt of 5, greedily and with 5 beams, for 1 and for 16 pictures. Both sides get pixels and
token ids, and their ids must be equal before anything is timed. They take turns, each in float32 on the same cores;
medians, smallest and largest are over the rounds. What ours takes to compile is shown apart.

It needs torch: pip install torch==2.13.0
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # Threads of torch that wait would take the cores from ours.

import jax
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models

from blip2_jax import api
from blip2_jax.decoding import GenerationConfig

NEW, PROMPT, SIZE = 20, 5, 224


def original(seed: int = 0) -> transformers.Blip2ForConditionalGeneration:
    """The model of transformers, with weights that write more than one token over and over."""
    torch.manual_seed(seed)
    vision = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
    qformer = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6}
    text = {"model_type": "opt", "hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072}
    text |= {"num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 50304, "max_position_embeddings": 512}
    config = transformers.Blip2Config(
        vision_config=vision | {"image_size": SIZE, "patch_size": 16},
        qformer_config=qformer | {"encoder_hidden_size": 384, "vocab_size": 30523},
        text_config=text,
        num_query_tokens=32,
        image_token_index=50265,
    )
    model = transformers.Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    return model


def saved(model: transformers.Blip2ForConditionalGeneration, folder: str) -> None:
    """The same as a directory that ours is loaded from, with a tokenizer of as many words."""
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(model.config.text_config.vocab_size)}
    words = {("\n" if name == "w3" else name): number for name, number in words.items()}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(f"{folder}/tokenizer.json")
    print(folder, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where the model of transformers is, or is to be; by default in TMPDIR")
    options = parser.parse_args()
    theirs, folder = original(), options.folder or os.path.join(tempfile.gettempdir(), "blip2_generation")
    if not os.path.isdir(folder):
        saved(theirs, folder)
    ours = api.load(folder)
    versions = {module.__name__: module.__version__ for module in (jax, torch, transformers)}
    print(", ".join(f"{name} {version}" for name, version in versions.items()), f"on {os.cpu_count()} cores")
    for batch in (1, 16):
        for beams in (1, 5):
            _measure(theirs, ours, batch, beams, options.rounds)


def _measure(theirs, ours: api.Blip2, batch: int, beams: int, rounds: int) -> None:
    task, rng = ours.task, np.random.default_rng(batch)
    pixels = rng.normal(size=(batch, SIZE, SIZE, 3)).astype(np.float32)
    prompt = rng.integers(4, 50000, (batch, PROMPT))
    writing = task.writing
    config = GenerationConfig(NEW, NEW, num_beams=beams)

    encode = jax.jit(lambda vision, pixels: task.encoder.module.apply({"params": vision}, pixels))

    def write() -> np.ndarray:
        embeds = encode(task.vision_parameters, pixels)
        soft_prompt = task.read(ours.trainable, embeds, [""] * batch)
        mask = np.ones(prompt.shape, bool)
        tokens = writing._write(task.language_parameters, soft_prompt, prompt, mask, None, config=config)
        return np.asarray(tokens)[:, 0]

    image = np.full((batch, 32), theirs.config.image_token_index)
    ids = torch.from_numpy(np.concatenate([image, prompt], axis=1))
    pictures = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    asked = {"num_beams": beams, "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": 3}

    def generate() -> np.ndarray:
        with torch.no_grad():
            found = theirs.generate(pixel_values=pictures, input_ids=ids, attention_mask=torch.ones_like(ids), **asked)
        return found[:, ids.shape[1] :].numpy()

    start = time.perf_counter()
    first = write()
    compiling = time.perf_counter() - start
    same = float((first == generate()).all(1).mean())
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(rounds):
        for name, run in (("ours", write), ("transformers", generate)):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    rate = {name: sorted(batch / second for second in found) for name, found in seconds.items()}
    show = lambda found: f"{statistics.median(found):.2f} ({found[0]:.2f} ... {found[-1]:.2f})"
    ratios = sorted(t / o for t, o in zip(seconds["transformers"], seconds["ours"], strict=True))
    print(
        f"batch {batch:2d}, {'greedy' if beams == 1 else f'beam {beams}'}: ours {show(rate['ours'])}, transformers "
        f"{show(rate['transformers'])} captions/s, ratio {show(ratios)}; "
        f"same texts {same:.0%}; first call {compiling:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
