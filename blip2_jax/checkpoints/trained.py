"""What other programs have trained: LAVIS's .pth files, and transformers' BLIP-2 and InstructBLIP directories."""

from __future__ import annotations

import functools
import pathlib
import re
from typing import NamedTuple

from blip2_jax import params
from blip2_jax.checkpoints import hub, mapping, qformer
from blip2_jax.checkpoints.huggingface import Directory, complete
from blip2_jax.checkpoints.mapping import Report, Tensors
from blip2_jax.checkpoints.torch_file import TorchFile
from blip2_jax.models.qformer import QFormerConfig

# Tensors that a stage may leave aside, in all dialects.
ASIDE: params.Table[str] = [
    (r"(visual_encoder|vision_model)\..*", "of the image encoder, which config.vision names"),
    (r"(opt_model|t5_model|llm_model|language_model)\..*", "of the language model, which config.llm names"),
    (r".*position_ids", "a buffer"),
    (r"Qformer\.cls\.predictions\.decoder\..*", "tied to the word embeddings"),
    (r"(vision_proj|text_proj|vision_projection|text_projection|itm_head)\..*|temp", "of stage 1"),
    (r"(Qformer\.bert\.|qformer\.|)embeddings\.(word|position)_embeddings\..*|Qformer\.cls\..*", "of text"),
    (r"(Qformer\.bert|qformer)\.encoder\.layer\.\d+\.(intermediate|output)\..*", "of text"),
    (r"(opt_proj|t5_proj|llm_proj|language_projection)\..*", "of stage 2"),
]
# What both stages of every program have.
_NEVER_MISSING = (
    r"ln_vision/norm/.*|qformer/(query_tokens|embeddings_norm/.*|image_projection/.*|"
    r"transformer/.*/(attention|cross_attention|query_mlp)/.*)"
)


class Source(NamedTuple):
    """A checkpoint of another program.

    Attributes:
      tensors: what it holds.
      dialect: what they are called.
      language: model_type of the language model that the projection speaks to; "" for a stage 1.
      exact_gelu: it runs T5 with exact GELU.
      instruct: its Q-Former reads instructions.
      has_tower: it holds an image encoder of its own.
    """

    tensors: Tensors
    dialect: qformer.Dialect
    language: str
    exact_gelu: bool
    instruct: bool
    has_tower: bool


def open_source(source: str) -> Source:
    """What "lavis:FILE" or "hf:DIR" names.

    Raises:
      FileNotFoundError, ConnectionError: nothing is there.
      ValueError: it cannot be read, or is not a BLIP-2.
    """
    kind, _, path = source.partition(":")
    if kind == "lavis":
        file = TorchFile(pathlib.Path(path).expanduser())
        names = set(file.names())
        if "query_tokens" not in names:
            raise ValueError(f"{path} is not a BLIP-2 of LAVIS: it has no tensor 'query_tokens'")
        projection = next((name for name in qformer.LAVIS_PROJECTIONS if f"{name}.weight" in names), "")
        reads = bool(projection) and "Qformer.bert.embeddings.word_embeddings.weight" in names
        tower = any(name.startswith("visual_encoder.") for name in names)
        language = qformer.LAVIS_PROJECTIONS.get(projection, "")
        return Source(file, qformer.lavis(projection), language, language == "t5", reads, tower)
    directory = Directory(hub.directory(path), beside=qformer.HEADS_FILE)
    config = complete(directory.config(), directory.where)
    model_type = config.get("model_type")
    if model_type not in qformer.TRANSFORMERS:
        raise ValueError(f"{path} is a {model_type!r}; expected one of {', '.join(qformer.TRANSFORMERS)}")
    text = config["text_config"] if "language_projection.weight" in directory.names() else {}
    exact = text.get("dense_act_fn") == "gelu"
    dialect = qformer.TRANSFORMERS[model_type]
    return Source(directory, dialect, text.get("model_type", ""), exact, model_type == "instructblip", False)


def check_fit(source: str, opened: Source, language: str, exact_gelu: bool, instruct: bool, vision: str) -> None:
    """Refuse a checkpoint whose Q-Former speaks to another language model, or looks through another encoder.

    Args:
      source: the string that named it.
      opened: of `open_source`.
      language: model_type of config.llm; "" in stage 1.
      exact_gelu: that model, if it is a T5, has exact GELU.
      instruct: the recipe's Q-Former reads instructions.
      vision: config.vision.

    Raises:
      ValueError: it does not fit.
    """
    alike = {"qwen2": "llama"}  # LAVIS has one name for both.
    plain = lambda kind: alike.get(kind, kind)
    if language and opened.language and plain(language) != plain(opened.language):
        raise ValueError(f"{source} was trained with a language model {opened.language!r}, config.llm is {language!r}")
    if language == opened.language == "t5" and opened.exact_gelu and not exact_gelu:
        raise ValueError(
            f"{source} was trained through a T5 with exact GELU, config.llm has the tanh approximation: "
            "add --config.llm_activation=gelu"
        )
    if opened.language and language and opened.instruct != instruct:
        what = "reads instructions" if opened.instruct else "reads no instructions"
        raise ValueError(f"the Q-Former of {source} {what}: add --config.instruct={opened.instruct}")
    if opened.has_tower and vision.partition(":")[2] != source.partition(":")[2]:
        raise ValueError(
            f"{source} holds a fine-tuned image encoder, without which its Q-Former is not what it was: "
            f"add --config.vision={source}"
        )


def read(opened: Source, template: params.Tree, config: QFormerConfig) -> tuple[params.Tree, Report]:
    """Those parameters of a trainable tree that a checkpoint of another program has.

    Args:
      opened: of `open_source`.
      template: the whole tree, as shapes.
      config: of the Q-Former.

    Returns:
      A part of the tree, and what was found.

    Raises:
      ValueError: a shape does not fit, something is missing that all have, or a Q-Former of other sizes is there.
    """
    tensors = opened.tensors
    table, known = qformer.table(opened.dialect), set(tensors.names())
    leaves = params.flatten(template)
    covered = {path: leaf for path, leaf in leaves.items() if any(re.fullmatch(row, path) for row, _ in table)}
    tree = params.unflatten(covered)
    layers_of = functools.partial(qformer.layers_of, config)
    mapped = mapping.resolve(tree, params.relevant(table, tree), layers_of)
    there = {
        path: pieces
        for path, pieces in mapped.items()
        if re.fullmatch(_NEVER_MISSING, path) or any(piece.name in known for piece in pieces)
    }
    report = mapping.account(tensors.names(), mapping.names(there), ASIDE)
    foreign = [name for name in report.unexpected if re.match(r"[Qq]former\.|query_tokens", name)]
    if foreign:
        raise ValueError(
            f"{tensors.where} has {len(foreign)} tensors of a Q-Former that this model has no place for, such as "
            f"{foreign[0]!r}: give the recipe the sizes of the checkpoint (config.model)"
        )
    return mapping.load(params.unflatten({path: leaves[path] for path in there}), there, tensors), report
