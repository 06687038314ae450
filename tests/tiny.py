"""Tiny random models in the directory layout of the real ones, and a recipe that trains on them in seconds."""

from __future__ import annotations

import io
import json
import pathlib
import runpy

import ml_collections
import numpy as np
from PIL import Image, ImageDraw
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tokenizers.normalizers import BertNormalizer

COLOURS = ("red", "green", "blue", "yellow", "black", "orange")
SHAPES = ("square", "circle", "triangle")


def save(directory: pathlib.Path, config: dict, tensors: dict[str, np.ndarray], tokenizer: Tokenizer) -> pathlib.Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: array.astype(np.float32) for name, array in tensors.items()}, directory / "model.safetensors")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def bert(directory: pathlib.Path, layers: int = 3, width: int = 24, head: bool = False) -> pathlib.Path:
    """A Hugging Face BERT with WordPiece."""
    rng = np.random.default_rng(1)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "of", *COLOURS, *SHAPES]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
        "vocab_size": len(words),
        "max_position_embeddings": 16,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    normal = lambda *shape: 0.2 * rng.normal(size=shape)
    tensors = {
        "embeddings.word_embeddings.weight": normal(len(words), width),
        "embeddings.position_embeddings.weight": normal(16, width),
        "embeddings.token_type_embeddings.weight": normal(2, width),
        "embeddings.LayerNorm.weight": 1 + normal(width),
        "embeddings.LayerNorm.bias": normal(width),
    }
    for layer in range(layers):
        prefix = f"encoder.layer.{layer}."
        for name, (out, into) in {
            "attention.self.query": (width, width),
            "attention.self.key": (width, width),
            "attention.self.value": (width, width),
            "attention.output.dense": (width, width),
            "intermediate.dense": (2 * width, width),
            "output.dense": (width, 2 * width),
        }.items():
            tensors |= {f"{prefix}{name}.weight": normal(out, into), f"{prefix}{name}.bias": normal(out)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            tensors |= {f"{prefix}{name}.weight": 1 + normal(width), f"{prefix}{name}.bias": normal(width)}
    if head:
        tensors = {f"bert.{name}": array for name, array in tensors.items()} | {
            "cls.predictions.transform.dense.weight": normal(width, width),
            "cls.predictions.transform.dense.bias": normal(width),
            "cls.predictions.transform.LayerNorm.weight": 1 + normal(width),
            "cls.predictions.transform.LayerNorm.bias": normal(width),
            "cls.predictions.bias": normal(len(words)),
        }
    return save(directory, config, tensors, tokenizer)


def _byte_level_tokenizer() -> Tokenizer:
    """What the language models here read; token 0 starts a text, 2 ends it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [f"a {colour} {shape} Question: category? Answer: shapes" for colour in COLOURS for shape in SHAPES]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def llama(directory: pathlib.Path, tied: bool = True) -> pathlib.Path:
    """A Hugging Face Llama with a byte-level tokenizer; 20 wide, 44 in its MLP, sizes that nothing else here has."""
    rng, tokenizer = np.random.default_rng(2), _byte_level_tokenizer()
    width, mlp, layers, vocabulary = 20, 44, 2, tokenizer.get_vocab_size()
    config = {
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "intermediate_size": mlp,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": tied,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    normal = lambda *shape: 0.2 * rng.normal(size=shape)
    tensors = {"model.embed_tokens.weight": normal(vocabulary, width), "model.norm.weight": 1 + normal(width)}
    if not tied:
        tensors["lm_head.weight"] = normal(vocabulary, width)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, (out, into) in {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (width // 5, width),
            "self_attn.v_proj": (width // 5, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (mlp, width),
            "mlp.up_proj": (mlp, width),
            "mlp.down_proj": (width, mlp),
        }.items():
            tensors[f"{prefix}{name}.weight"] = normal(out, into)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = 1 + normal(width)
    return save(directory, config, tensors, tokenizer)


def t5(directory: pathlib.Path) -> pathlib.Path:
    """A Hugging Face T5 v1.1 with the tokenizer of the Llama."""
    rng, tokenizer = np.random.default_rng(4), _byte_level_tokenizer()
    width, mlp, heads, size, vocabulary = 20, 36, 2, 6, tokenizer.get_vocab_size()
    config = {
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "vocab_size": vocabulary,
        "d_model": width,
        "d_ff": mlp,
        "d_kv": size,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": heads,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    normal = lambda *shape: 0.2 * rng.normal(size=shape)
    tensors = {name: normal(vocabulary, width) for name in ("shared.weight", "lm_head.weight")}
    shapes = dict.fromkeys("qkv", (heads * size, width)) | {"o": (width, heads * size)}
    for side, blocks in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        tensors[f"{side}.final_layer_norm.weight"] = 1 + normal(width)
        first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        tensors[first] = normal(8, heads)
        for layer in range(2):
            prefix = f"{side}.block.{layer}.layer."
            for number, block in enumerate(blocks):
                tensors |= {f"{prefix}{number}.{block}.{name}.weight": normal(*shape) for name, shape in shapes.items()}
            for number in range(len(blocks) + 1):
                tensors[f"{prefix}{number}.layer_norm.weight"] = 1 + normal(width)
            mlp_shapes = {"wi_0": (mlp, width), "wi_1": (mlp, width), "wo": (width, mlp)}
            for name, shape in mlp_shapes.items():
                tensors[f"{prefix}{len(blocks)}.DenseReluDense.{name}.weight"] = normal(*shape)
    return save(directory, config, tensors, tokenizer)


def vit(directory: pathlib.Path) -> pathlib.Path:
    """transformers' image encoder of BLIP-2, for pictures of 32 pixels."""
    rng = np.random.default_rng(3)
    width, mlp, patch = 24, 40, 16
    config = {
        "model_type": "blip_2_vision_model",
        "image_size": 32,
        "patch_size": patch,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": mlp,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    }
    normal = lambda *shape: 0.2 * rng.normal(size=shape)
    tensors = {
        "embeddings.class_embedding": normal(1, 1, width),
        "embeddings.position_embedding": normal(1, 5, width),
        "embeddings.patch_embedding.weight": normal(width, 3, patch, patch),
        "embeddings.patch_embedding.bias": normal(width),
    }
    for layer in range(2):
        for name, (out, into) in {
            "self_attn.qkv": (3 * width, width),
            "self_attn.projection": (width, width),
            "mlp.fc1": (mlp, width),
            "mlp.fc2": (width, mlp),
        }.items():
            tensors[f"encoder.layers.{layer}.{name}.weight"] = normal(out, into)
            tensors[f"encoder.layers.{layer}.{name}.bias"] = normal(out)
        for name in ("layer_norm1", "layer_norm2"):
            tensors[f"encoder.layers.{layer}.{name}.weight"] = 1 + normal(width)
            tensors[f"encoder.layers.{layer}.{name}.bias"] = normal(width)
    return save(directory, config, tensors, Tokenizer(models.BPE()))


def pictures(directory: pathlib.Path) -> str:
    """Coloured shapes with captions, as a jsonl source."""
    directory.mkdir(parents=True)
    lines = []
    for colour in COLOURS:
        for number, shape in enumerate(SHAPES):
            image = Image.new("RGB", (40, 40), "white")
            draw = ImageDraw.Draw(image)
            corners = [(6, 6), (34, 34)]
            if shape == "triangle":
                draw.polygon([(20, 4), (36, 36), (4, 36)], fill=colour)
            else:
                (draw.rectangle if shape == "square" else draw.ellipse)(corners, fill=colour)
            stream = io.BytesIO()
            image.save(stream, "PNG")
            name = f"{colour}_{number}.png"
            (directory / name).write_bytes(stream.getvalue())
            lines.append(json.dumps({"image": name, "caption": f"A {colour} {shape}."}))
    (directory / "pictures.jsonl").write_text("\n".join(lines))
    return f"jsonl:{directory / 'pictures.jsonl'}"


def recipe(stage: str, folder: pathlib.Path, **changes) -> ml_collections.ConfigDict:
    """The nano recipe of a stage on tiny models and pictures that are made in `folder` the first time."""
    config = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "configs" / f"{stage}.py"))["get_config"]()
    for name, make in (("bert", bert), ("llama", llama), ("vit", vit), ("pictures", pictures)):
        if not (folder / name).exists():
            make(folder / name)
    source = f"jsonl:{folder / 'pictures' / 'pictures.jsonl'}"
    settings = {
        "bert": f"hf:{folder / 'bert'}",
        "image_size": 64,
        "total_steps": 6,
        "batch_size": 8,
        "log_every": 2,
        "checkpoint_every": 2,
        "data.train": source,
        "data.eval": source,
        "data.feature_views": 2,
        "data.max_text_tokens": 6,
        "model.layers": 3,
        "model.queries": 2,
        "model.embed_width": 8,
        "evaluation.batch_size": 8,
        "mesh": "data=-1",
    }
    if stage == "stage2":
        settings |= {"llm": f"hf:{folder / 'llama'}", "data.questions": "", "evaluation.max_new_tokens": 4}
    else:
        # A row on each of eight devices: every one takes part.
        settings |= {"evaluation.rerank": 2, "objective.itm_share": 1.0, "objective.itg_share": 1.0}
        # An alarm that holds from step 4 on, so that resumed runs have one to raise again.
        settings |= {"alarms.window": 2, "alarms.itc_margin": 9.0}
    config.update_from_flattened_dict(settings | changes)
    return config


def recipe_file(config: ml_collections.ConfigDict, file: pathlib.Path) -> pathlib.Path:
    """A recipe for --config, which gives this configuration."""
    file.write_text(
        "import json\nfrom ml_collections import ConfigDict\ndef get_config():\n"
        f"    return ConfigDict(json.loads({config.to_json()!r}))\n"
    )
    return file
