"""What other programs have trained: LAVIS's .pth files, and transformers' BLIP-2 and InstructBLIP directories."""

from __future__ import annotations

import functools
import re

from blip2_jax import params
from blip2_jax.checkpoints import mapping, qformer
from blip2_jax.checkpoints.huggingface import Directory
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


def open_source(source: str) -> tuple[Tensors, qformer.Dialect]:
    """The tensors that "lavis:FILE" or "hf:DIR" names, and what they are called there.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it cannot be read, or is not a BLIP-2.
    """
    kind, _, path = source.partition(":")
    if kind == "lavis":
        file = TorchFile(path)
        names = file.names()
        if "query_tokens" not in names:
            raise ValueError(f"{path} is not a BLIP-2 of LAVIS: it has no tensor 'query_tokens'")
        return file, qformer.lavis(next((name for name in qformer.LAVIS_PROJECTIONS if f"{name}.weight" in names), ""))
    directory = Directory(path, beside=qformer.HEADS_FILE)
    model_type = directory.config().get("model_type")
    if model_type not in qformer.TRANSFORMERS:
        raise ValueError(f"{path} is a {model_type!r}; expected one of {', '.join(qformer.TRANSFORMERS)}")
    return directory, qformer.TRANSFORMERS[model_type]


def read(source: str, template: params.Tree, config: QFormerConfig) -> tuple[params.Tree, Report]:
    """Those parameters of a trainable tree that a checkpoint of another program has.

    Args:
      source: "lavis:FILE" or "hf:DIR".
      template: the whole tree, as shapes.
      config: of the Q-Former.

    Returns:
      A part of the tree, and what was found.

    Raises:
      ValueError: a shape does not fit, something is missing that all have, or a Q-Former of other sizes is there.
    """
    tensors, dialect = open_source(source)
    table, known = qformer.table(dialect), set(tensors.names())
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
            f"{source} has {len(foreign)} tensors of a Q-Former that this model has no place for, such as "
            f"{foreign[0]!r}: give the recipe the sizes of the checkpoint (config.model)"
        )
    return mapping.load(params.unflatten({path: leaves[path] for path in there}), there, tensors), report
