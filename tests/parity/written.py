"""What language models write in stage 2, InstructBLIP and transformers: token ids and scores by recorded name."""

from __future__ import annotations

import ast
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blip2_jax import decoding
from blip2_jax.decoding import GenerationConfig, writers
from blip2_jax.decoding.constraints import Constraints
from blip2_jax.models.language.t5 import T5
from tests.parity import forward_stage2, golden
from tests.parity.forward_stage1 import Quantities
from tests.parity.forward_stage2 import Model
from tests.parity.golden import Case

_BEHIND = -1  # In the place of what stands behind the end of a text: padding, of which every program has its own.


class Text(NamedTuple):
    """One recorded generation.

    Attributes:
      name: of the recorded quantities.
      inputs: arrays by name, `prefix` to be embedded or `embeds`, with `mask`.
      config: how it was written.
      end: the end token.
      history: int32[B, H] of `decoding.generate`, or None.
      before: recorded tokens that stand before the new ones.
    """

    name: str
    inputs: dict[str, np.ndarray]
    config: GenerationConfig
    end: int
    history: np.ndarray | None
    before: int


def lavis(case: Case, mesh: Mesh | None) -> Quantities:
    """What `generate` and `predict_answers` of LAVIS gave."""
    kind, projection = _KINDS[case.name]
    instruct = case.name.startswith("instruct")
    model = forward_stage2.build(case, instruct, projection, kind)
    found: Quantities = {}
    for name, recorded in case.meta.items():
        if isinstance(recorded, dict) and "llm_generate_kwargs" in recorded:
            text = _lavis_text(case, name, recorded["llm_generate_kwargs"], instruct)
            found |= _compared(case, model, text, f"{name}.ids", mesh)
    return found | _ranked(case, model, kind, mesh)


_KINDS = {
    "stage2_opt": ("opt", "opt_proj"),
    "stage2_t5": ("t5", "t5_proj"),
    "instruct_t5": ("t5", "t5_proj"),
    "instruct_vicuna": ("llama", "llm_proj"),
}


def _lavis_text(case: Case, name: str, asked: dict[str, Any], instruct: bool) -> Text:
    ids, settings = case.outputs[f"{name}.ids"], case.meta["llm_config"]
    settings = ast.literal_eval(settings) if isinstance(settings, str) else settings
    encoder_decoder = settings.get("is_encoder_decoder", False)
    # All that was written begins with a token that nobody reads, or that the decoder starts with; lengths count it.
    longest = asked.get("max_new_tokens", asked.get("max_length", 0) - 1)
    config = GenerationConfig(
        longest,
        max(asked.get("min_length", 0) - 1, 0),
        num_beams=asked["num_beams"],
        num_return_sequences=asked.get("num_return_sequences", 1),
        length_penalty=float(asked["length_penalty"]),
        repetition_penalty=asked.get("repetition_penalty", 1.0),
        convention="lavis",
    )
    inputs = forward_stage2.lavis_inputs(case, name, instruct)
    if inputs is None:  # Its tokens are not recorded, but what they became is.
        inputs = {"embeds": case.outputs[f"{name}.inputs_embeds"], "mask": case.outputs[f"{name}.attention_mask"]}
    end = asked.get("eos_token_id", case.meta.get("eos_token_id", settings["eos_token_id"]))
    return Text(name, inputs, config, end, None if encoder_decoder else ids[: len(inputs["mask"]), :1], 1)


# The prompt of predict_class in the tokens of the Q-Former, whose vocabulary is not recorded.
_INSTRUCTIONS = {"question: what is it? answer:": [2, 30, 8, 26, 25, 43, 59, 5, 31, 8, 3]}


def _ranked(case: Case, model: Model, kind: str, mesh: Mesh | None) -> Quantities:
    """Losses of the candidates of predict_class, and their order; candidates may have gone in several segments."""
    prompt, found = case.meta.get("class_prompt"), {}
    for name in [name.removesuffix(".losses") for name in case.outputs if name.endswith(".losses")]:
        losses = []
        for key in sorted(key for key in case.inputs if key.startswith(f"{name}.labels.")):
            labels = case.inputs[key]
            log_probabilities = _of_candidates(case, model, kind, prompt, labels, mesh)
            # Of a decoder the original takes the mean over the whole row, whatever else stands there.
            losses.append(-log_probabilities / (1 if kind == "t5" else labels.shape[1] - 1))
        ours = np.concatenate(losses, axis=1)
        found |= {f"{name}.losses": ours, f"{name}.ranks": np.argsort(ours, axis=1)}
    return found


def _of_candidates(case: Case, model: Model, kind: str, prompt: str, labels: np.ndarray, mesh) -> np.ndarray:
    """float32[B, C], log-probabilities of the candidates that int[B * C, T] has behind the prompt."""
    images = case.image("image")
    there = labels >= 0
    order = np.argsort(~there, axis=1, kind="stable")  # Candidates to the left.
    length = there.sum(1).max()
    shape = (len(images), len(labels) // len(images), length)
    text_ids = np.take_along_axis(np.maximum(labels, 0), order, 1)[:, :length].reshape(shape)
    text_mask = np.take_along_axis(there, order, 1)[:, :length].reshape(shape)
    ids = _tokens(prompt, case.meta["vocab"], merges=kind == "llama")
    # InstructBLIP's decoders begin with the token that ends its texts, encoders end with it.
    vocabulary = case.meta["vocab"]
    ids = [vocabulary["</s>"], *ids] if kind == "llama" else [*ids, vocabulary["</s>"]]
    repeated = lambda row: np.tile(np.asarray(row, np.int32), (len(images), 1))
    instruction = repeated(_INSTRUCTIONS[prompt])
    batch = {"image": images, "ids": repeated(ids), "instruction_ids": instruction}
    batch |= {"instruction_mask": np.ones_like(instruction), "text_ids": text_ids, "text_mask": text_mask}

    def judge(trees, batch):
        embeds = _prefix(model, trees, batch)
        mask = jnp.ones(embeds.shape[:2], bool)
        texts = batch["text_ids"], batch["text_mask"]
        return decoding.log_probabilities(model.language.module, trees["language"], embeds, mask, *texts)

    return golden.run(judge, model.trees, batch, mesh)


def _tokens(text: str, vocabulary: dict[str, int], merges: bool) -> list[int]:
    """Of a text by the tiny vocabularies: by merges in the order of their numbers, or by the longest pieces."""
    pieces = [c for word in text.split() for c in "\N{LOWER ONE EIGHTH BLOCK}" + word]
    if not merges:
        return [vocabulary[piece] for word in "".join(pieces).split() for piece in _longest(word, vocabulary)]
    while True:
        joined = ["".join(pair) for pair in itertools.pairwise(pieces)]
        pairs = [(vocabulary[piece], place) for place, piece in enumerate(joined) if piece in vocabulary]
        if not pairs:
            return [vocabulary[piece] for piece in pieces]
        _, place = min(pairs)
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]


def _longest(text: str, vocabulary: dict[str, int]) -> list[str]:
    """Its longest pieces, from the left."""
    pieces = []
    while text:
        piece = next(text[:end] for end in range(len(text), 0, -1) if text[:end] in vocabulary)
        pieces.append(piece)
        text = text[len(piece) :]
    return pieces


def huggingface(case: Case, mesh: Mesh | None) -> Quantities:
    """What `generate` of transformers gave."""
    model, batch = forward_stage2.whole_model(case)
    found: Quantities = {}
    for name in case.outputs:
        if name.startswith("gen_") and name.endswith(".sequences"):
            name = name.removesuffix(".sequences")
            text = _huggingface_text(case, name, batch, isinstance(model.language.module, T5))
            found |= _compared(case, model, text, f"{name}.sequences", mesh)
            if f"{name}.step_scores" in case.outputs:
                found[f"{name}.step_scores"] = _step_scores(case, model, text, mesh)
    return found


def _huggingface_text(case: Case, name: str, batch: dict[str, np.ndarray], encoder_decoder: bool) -> Text:
    asked, sequences = case.meta["generate_kwargs"].get(name, {}), case.outputs[f"{name}.sequences"]
    queries, image, settings = (
        case.config["num_query_tokens"],
        case.config["image_token_index"],
        case.config["text_config"],
    )
    ids, mask = (case.inputs.get(f"gen_{x}", batch[x]) for x in ("input_ids", "attention_mask"))
    if name.endswith("_no_prompt"):
        row = [image] * queries + [settings["bos_token_id"]]
        ids = np.tile(np.asarray(row, np.int32), (len(ids), 1))
        mask = np.ones_like(ids)
    before = 1 if encoder_decoder else ids.shape[1]
    config = GenerationConfig(
        asked.get("max_new_tokens", sequences.shape[1] - before),
        asked.get("min_new_tokens", 0),
        num_beams=asked.get("num_beams", 1),
        num_return_sequences=asked.get("num_return_sequences", 1),
        length_penalty=asked.get("length_penalty", 1.0),
        repetition_penalty=asked.get("repetition_penalty", 1.0),
    )
    inputs = {key: batch[key] for key in ("image", "instruction_ids", "instruction_mask") if key in batch}
    inputs |= {"ids": ids, "mask": mask, "is_image": ids == image}
    end = asked.get("eos_token_id", settings["eos_token_id"])
    # Images are among what is written before, since transformers has them there.
    history = None if encoder_decoder else np.where(mask, ids, -1)
    return Text(name, inputs, config, end, history, before)


def _prefix(model: Model, trees, batch) -> jax.Array:
    if "embeds" in batch:
        return batch["embeds"]
    prompt, _ = forward_stage2.soft_prompt(model, trees, batch)
    embeds = forward_stage2.embed(model, trees, batch["ids"])
    if "is_image" in batch:
        return forward_stage2.put(prompt, embeds, batch["is_image"])
    return jnp.concatenate([prompt, embeds], axis=1)


def _with_history(text: Text) -> dict[str, np.ndarray]:
    return text.inputs if text.history is None else text.inputs | {"history": text.history.astype(np.int32)}


def _compared(case: Case, model: Model, text: Text, recorded: str, mesh: Mesh | None) -> Quantities:
    """Ids up to each end, ours and the recorded ones, and the scores of beams."""

    def write(trees, batch):
        embeds, mask = _prefix(model, trees, batch), batch["mask"].astype(bool)
        module, parameters = model.language.module, trees["language"]
        history = batch.get("history")
        return decoding.generate(module, parameters, embeds, mask, text.config, text.end, history=history)

    written = golden.run(write, model.trees, _with_history(text), mesh)
    theirs = case.outputs[recorded][:, text.before :]
    tokens = written.tokens.reshape(-1, text.config.max_new_tokens)
    found: Quantities = {recorded: (_until_end(tokens, text.end), _until_end(theirs, text.end, tokens.shape[1]))}
    if f"{text.name}.sequences_scores" in case.outputs:
        found[f"{text.name}.sequences_scores"] = written.scores.reshape(-1)
    return found


def _until_end(tokens: np.ndarray, end: int, length: int = 0) -> np.ndarray:
    """int[B, length], with everything behind the first end, and what is cut off, alike."""
    tokens = np.pad(tokens, ((0, 0), (0, max(length - tokens.shape[1], 0))), constant_values=_BEHIND)
    behind = np.cumsum(np.pad(tokens[:, :-1], ((0, 0), (1, 0))) == end, axis=1) > 0
    return np.where(behind, _BEHIND, tokens)


def _step_scores(case: Case, model: Model, text: Text, mesh: Mesh | None) -> tuple[np.ndarray, np.ndarray]:
    """The scores of every step of greedy decoding, where the text had not ended."""
    sequences = case.outputs[f"{text.name}.sequences"][:, text.before :].astype(np.int32)

    def scores(trees, batch):
        embeds, mask = _prefix(model, trees, batch), batch["mask"].astype(bool)
        rows, length = batch["forced"].shape
        places = jnp.arange(length)
        writer = writers.writer_of(model.language.module, trees["language"], embeds, mask, places)
        # All at once, where decoding goes step by step.
        seen = (places[:, None] >= places)[None]
        hidden, _ = writer.read(writer.state, batch["forced"], 0, seen)
        logits = writer.logits(jnp.concatenate([writer.first[:, None], hidden[:, :-1]], axis=1))
        # The start token of an encoder-decoder counts as written.
        constrained = Constraints(text.config, text.end, batch.get("history", jnp.zeros((rows, 1), jnp.int32)))
        forced = batch["forced"][:, None]
        of_place = lambda place: constrained(logits[:, place, None], forced, place)[:, 0]
        return jnp.stack([of_place(place) for place in range(length)], axis=1)

    ours = golden.run(scores, model.trees, _with_history(text) | {"forced": sequences}, mesh)
    there = _until_end(sequences, text.end) != _BEHIND
    finite = lambda x: np.where(np.isneginf(x), -1e9, x)
    theirs = case.outputs[f"{text.name}.step_scores"]
    return finite(ours)[there], finite(theirs)[there]
