"""A BLIP-2 of ours as a directory that transformers loads: config.json, weights, tokenizer and processor."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer

from blip2_jax import params
from blip2_jax.checkpoints import language, mapping, qformer, vision
from blip2_jax.checkpoints.frozen import Frozen
from blip2_jax.checkpoints.huggingface import complete, load_tokenizer
from blip2_jax.models import lora
from blip2_jax.models.blip2 import Blip2Config
from blip2_jax.models.vision import VisionEncoder
from blip2_jax.models.vision.vit import ViT, ViTConfig
from blip2_jax.monitoring.progress import progress

IMAGE_TOKEN = "<image>"
_SHARD_BYTES = 2 * 10**9
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt")
_BERT_TOKENS = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
_HIDDEN_ACT = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}
# What transformers' BLIP-2 has no place for.
HEADS = r"temperature|qformer/lm_head/.*"

Named = Iterator[tuple[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Exported:
    """What a directory is made of.

    Attributes:
      config: its config.json.
      tensors: of model.safetensors.
      count: of them.
      heads: what transformers has no place for, by LAVIS's names.
      tokenizer: of the text.
      tokenizer_folder: where its other files are.
      instruction_folder: where the tokenizer of InstructBLIP's Q-Former is; else None.
      encoder: what the pictures are prepared for.
      queries: Q.
    """

    config: dict[str, Any]
    tensors: Named
    count: int
    heads: dict[str, np.ndarray]
    tokenizer: Tokenizer
    tokenizer_folder: pathlib.Path
    instruction_folder: pathlib.Path | None
    encoder: VisionEncoder
    queries: int


def _refuse_what_transformers_lacks(encoder: VisionEncoder, blip2: Blip2Config, stage: str) -> None:
    config = encoder.module.config if isinstance(encoder.module, ViT) else None
    plain = config and config.class_token and config.patch_bias and not (config.pre_norm or config.final_norm)
    lacking = {
        "an image encoder other than EVA-CLIP's ViT": not plain,
        "learned positions of image tokens (config.model.image_positions)": blip2.image_positions,
        "text features by mean (config.model.text_pooling)": stage == "stage1" and blip2.text_pooling != "cls",
    }
    found = [what for what, there in lacking.items() if there]
    if found:
        raise ValueError(f"transformers' BLIP-2 has no place for {' and '.join(found)}: this model cannot be exported")


def _vision_config(config: ViTConfig) -> dict[str, Any]:
    return {
        "image_size": config.image_size,
        "patch_size": config.patch,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": _HIDDEN_ACT[config.activation],
        "layer_norm_eps": config.norm_epsilon,
    }


def _config(encoder: VisionEncoder, blip2: Blip2Config, kind: str, text: dict[str, Any], **rest: Any) -> dict:
    q = blip2.qformer
    sizes = {
        "hidden_size": q.width,
        "num_hidden_layers": q.layers,
        "num_attention_heads": q.heads,
        "intermediate_size": q.mlp_width,
        "vocab_size": q.vocab_size,
        "max_position_embeddings": q.max_positions,
        "layer_norm_eps": q.norm_epsilon,
        "cross_attention_frequency": q.cross_attention_every,
        "encoder_hidden_size": encoder.width,
    }
    if kind == "blip-2":
        sizes["use_qformer_text_input"] = "Retrieval" in rest["architectures"][0]
        rest["image_text_hidden_size"] = blip2.embed_width
    return complete(
        {
            "model_type": kind,
            "vision_config": _vision_config(encoder.module.config),
            "qformer_config": sizes,
            "text_config": text,
            "num_query_tokens": q.queries,
            **rest,
        }
    )


def _vision_tensors(encoder: VisionEncoder, tree: params.Tree) -> tuple[Named, int]:
    config = encoder.module.config
    table = vision.table(vision.TRANSFORMERS_BLIP2, config)
    mapped = mapping.resolve(tree, table, functools.partial(vision.layers_of, config), "vision_model.")
    return mapping.export(tree, mapped), len(mapping.names(mapped))


def _trained_tensors(trainable: params.Tree, blip2: Blip2Config, kind: str) -> tuple[Named, int, dict[str, np.ndarray]]:
    """Tensors of transformers' model, their number, and those of the heads that it lacks."""
    table = params.relevant(qformer.table(qformer.TRANSFORMERS[kind]), trainable)
    mapped = mapping.resolve(trainable, table, functools.partial(qformer.layers_of, blip2.qformer))
    flat = params.flatten(trainable)
    heads = params.unflatten({path: leaf for path, leaf in flat.items() if re.fullmatch(HEADS, path)})
    rest = params.unflatten({path: leaf for path, leaf in flat.items() if not re.fullmatch(HEADS, path)})
    count = len(mapping.names({path: mapped[path] for path in params.flatten(rest)}))
    return mapping.export(rest, mapped), count, dict(mapping.export(heads, mapped))


def stage1(trainable: params.Tree, vision_tree: params.Tree, encoder: VisionEncoder, blip2: Blip2Config, bert: Frozen):
    """Blip2ForImageTextRetrieval: ITC and ITM; the temperature and ITG's head stand beside it."""
    _refuse_what_transformers_lacks(encoder, blip2, "stage1")
    tower, tower_count = _vision_tensors(encoder, vision_tree)
    own, own_count, heads = _trained_tensors(trainable, blip2, "blip-2")
    config = _config(encoder, blip2, "blip-2", {"model_type": "opt"}, architectures=["Blip2ForImageTextRetrieval"])
    tokenizer = load_tokenizer(bert.path)
    tokenizer.add_special_tokens([AddedToken("[DEC]", special=True)])  # The row that the Q-Former has for it.
    tensors = (pair for part in (tower, own) for pair in part)
    queries = blip2.qformer.queries
    return Exported(config, tensors, tower_count + own_count, heads, tokenizer, bert.path, None, encoder, queries)


def stage2(
    trainable: params.Tree,
    vision_tree: params.Tree,
    encoder: VisionEncoder,
    blip2: Blip2Config,
    llm: Frozen,
    end_token: int,
    llm_activation: str = "",
    instruction_folder: pathlib.Path | None = None,
    adapters: Mapping[str, lora.Pair] = MappingProxyType({}),
):
    """Blip2ForConditionalGeneration, the language model as its own file has it, tensor by tensor.

    InstructBlipForConditionalGeneration where the Q-Former reads instructions, whose tokenizer is in a folder. A text
    ends with `end_token`. `adapters`, by the path of a kernel of the language model, are merged into it.
    """
    kind = "instructblip" if instruction_folder else "blip-2"
    _refuse_what_transformers_lacks(encoder, blip2, "stage2")
    text = dict(language.own_config(llm.config))
    tied = text.get("tie_word_embeddings", False) and text["model_type"] != "t5"
    if llm_activation:
        text["dense_act_fn"] = {"gelu_tanh": "gelu_new"}.get(llm_activation, llm_activation)
    tokenizer = load_tokenizer(llm.path)
    tokenizer.add_special_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)])
    image_token = tokenizer.token_to_id(IMAGE_TOKEN)
    text["eos_token_id"] = end_token
    rows = max(text["vocab_size"], image_token + 1)
    spoken, spoken_count = _language_tensors(llm, text, rows, adapters)
    text["vocab_size"] = rows
    tower, tower_count = _vision_tensors(encoder, vision_tree)
    own, own_count, heads = _trained_tensors(trainable, blip2, kind)
    config = _config(
        encoder,
        blip2,
        kind,
        text,
        image_token_index=image_token,
        architectures=[("InstructBlip" if instruction_folder else "Blip2") + "ForConditionalGeneration"],
        tie_word_embeddings=tied,
    )
    # transformers says True of any T5, and means it in older versions.
    config["text_config"]["tie_word_embeddings"] = tied
    tensors = (pair for part in (tower, own, spoken) for pair in part)
    count, queries = tower_count + own_count + spoken_count, blip2.qformer.queries
    return Exported(config, tensors, count, heads, tokenizer, llm.path, instruction_folder, encoder, queries)


def _language_tensors(
    llm: Frozen, text: dict[str, Any], rows: int, adapters: Mapping[str, lora.Pair]
) -> tuple[Named, int]:
    """The language model's tensors; vocabularies grow to `rows`, by the mean row, so that the image token has one."""
    family = language.family(text)
    config = family.config(text)
    tensors = language.tensors(family, llm.tensors)
    template = language.shapes(family.module(config))
    mapped = mapping.resolve(template, family.table(config), functools.partial(family.layers, config))
    vocabularies = {
        piece.name for path in ("embeddings/embedding", "lm_head/embedding") for piece in mapped.get(path, ())
    }
    names = list(mapping.names(mapped))
    added = {}
    for path, pair in adapters.items():
        for piece in mapped[path]:
            added[piece.name] = piece.layout, pair.at(piece.index[: pair.stacked])

    def read() -> Named:
        for name in names:
            array = tensors.read(name)
            if name in vocabularies and len(array) < rows:
                mean = array.astype(np.float32).mean(0, keepdims=True).astype(array.dtype)
                array = np.concatenate([array, np.repeat(mean, rows - len(array), axis=0)])
            if name in added:
                layout, pair = added[name]
                more = layout.to_foreign(np.asarray(pair.product()))
                array = (array.astype(np.float32) + more).astype(array.dtype)
            yield f"language_model.{name}", array

    return read(), len(names)


def write(exported: Exported, output: pathlib.Path) -> None:
    """Write a directory; it appears whole or not at all.

    Raises:
      FileExistsError: there is something already.
    """
    if output.exists():
        raise FileExistsError(f"{output} is there already: name a folder that is not")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{output.name}.", dir=output.parent) as folder:
        partial = pathlib.Path(folder) / "partial"
        partial.mkdir()
        _write_json(partial / "config.json", exported.config)
        _write_weights(exported, partial)
        if exported.heads:
            save_file(exported.heads, partial / qformer.HEADS_FILE)
        _write_processor(exported, partial)
        partial.rename(output)


def _write_json(file: pathlib.Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _write_weights(exported: Exported, folder: pathlib.Path) -> None:
    """model.safetensors, or shards of at most `_SHARD_BYTES` with their index."""
    shards: list[list[str]] = []
    waiting: dict[str, np.ndarray] = {}
    total = size = 0

    def flush() -> None:
        save_file(waiting, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(waiting))
        waiting.clear()

    for name, array in progress(exported.tensors, total=exported.count, desc="writing weights", unit="tensor"):
        if waiting and size + array.nbytes > _SHARD_BYTES:
            flush()
            size = 0
        waiting[name] = array
        size, total = size + array.nbytes, total + array.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return
    placed = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}.safetensors").rename(folder / file)
        placed |= dict.fromkeys(names, file)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": placed})


def _write_processor(exported: Exported, folder: pathlib.Path) -> None:
    _write_tokenizer(exported.tokenizer, exported.tokenizer_folder, folder)
    if exported.instruction_folder:
        own = folder / qformer.INSTRUCTION_TOKENIZER
        own.mkdir()
        _write_tokenizer(load_tokenizer(exported.instruction_folder), exported.instruction_folder, own)
    size, encoder = exported.encoder.image_size, exported.encoder
    pictures = {
        "image_processor_type": "BlipImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,  # Bicubic.
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [mean / 255 for mean in encoder.image_mean],
        "image_std": [std / 255 for std in encoder.image_std],
        "do_convert_rgb": True,
    }
    _write_json(folder / "preprocessor_config.json", pictures)
    processor = "InstructBlipProcessor" if exported.instruction_folder else "Blip2Processor"
    kind = {"processor_class": processor}
    if exported.config.get("image_token_index") is not None:
        kind["num_query_tokens"] = exported.queries  # So many image tokens the processor puts before a text.
    _write_json(folder / "processor_config.json", kind)


def _write_tokenizer(tokenizer: Tokenizer, source: pathlib.Path, folder: pathlib.Path) -> None:
    """tokenizer.json, and what else transformers wants to know: the files beside the original, or from its config."""
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    tokenizer.save(str(folder / "tokenizer.json"))
    if (folder / "tokenizer_config.json").exists():
        return
    known = json.loads((source / "config.json").read_text())
    ids = {name: known.get(f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")}
    named = {name: tokenizer.id_to_token(number) for name, number in ids.items() if isinstance(number, int)}
    if tokenizer.token_to_id("[CLS]") is not None:
        named |= _BERT_TOKENS
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named})
