"""Tiny models that write, with weights far from uniform: a prefix of random embeddings, and END somewhere in a text."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from blip2_jax import decoding
from blip2_jax.decoding import Draws, GenerationConfig, Written
from blip2_jax.models.blip2 import Blip2Config, ImageTextModel
from blip2_jax.models.language.llama import Llama, LlamaConfig
from blip2_jax.models.language.opt import OPT, OPTConfig
from blip2_jax.models.language.t5 import T5, T5Config
from blip2_jax.models.qformer import QFormerConfig

V, D, END, START = 31, 24, 5, 30
SIZES = {"vocab_size": V, "width": D, "heads": 4, "head_size": 6, "mlp_width": 40}
LANGUAGE_MODELS = {
    "opt": OPT(OPTConfig(**SIZES, layers=2, kv_heads=4, max_positions=64)),
    "llama": Llama(LlamaConfig(**SIZES, layers=2, kv_heads=2)),
    "t5": T5(T5Config(**SIZES, encoder_layers=2, decoder_layers=2)),
}
QFORMER = QFormerConfig(
    width=D, layers=3, heads=4, mlp_width=40, vocab_size=V, max_positions=16, queries=3, dropout=0, attention_dropout=0
)
KINDS = [*LANGUAGE_MODELS, "qformer"]


def _loud(parameters: dict, factor: float) -> dict:
    return jax.tree.map(lambda x: x * factor + 0.1 * jax.random.normal(jax.random.key(2), x.shape), parameters)


@functools.cache
def language_model(kind: str) -> tuple:
    """The module and its parameters."""
    module = LANGUAGE_MODELS[kind]
    init = jax.jit(functools.partial(module.init, method="initialize"))
    # T5 divides attention's products by nothing: it would be so near to saturation that rounding decides.
    factor = 1 if kind == "t5" else 3
    return module, _loud(init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"], factor)


@functools.cache
def captioner() -> tuple:
    """Stage 1 and its parameters."""
    model = ImageTextModel(Blip2Config(QFORMER, embed_width=4))

    def every_pass(model, embeds, ids):
        seen = model.image_features(model.project_image(embeds))
        return model.caption_features(seen.cache, ids, jnp.ones(ids.shape, bool))

    init = jax.jit(functools.partial(model.init, method=every_pass))
    return model, _loud(init(jax.random.key(1), jnp.zeros((2, 5, D)), jnp.zeros((2, 4), jnp.int32))["params"], 4)


def prefixes(count: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """float32[B, T, D] of different lengths, filled from the left, and bool[B, T]."""
    rng = np.random.default_rng(0)
    mask = np.arange(longest) < rng.integers(1, longest + 1, (count, 1))
    return np.where(mask[..., None], rng.normal(size=(count, longest, D)), 9.0).astype(np.float32), mask


@functools.cache
def writer(kind: str, config: GenerationConfig):
    """A compiled function of embeds, mask and draws: what is written behind them."""
    if kind == "qformer":
        model, parameters = captioner()
        read = lambda model, embeds: model.image_features(model.project_image(embeds)).cache

        def write(parameters, embeds, mask, draws) -> Written:
            cache = model.apply({"params": parameters}, embeds * mask[..., None], method=read)
            return decoding.caption(model, parameters, cache, config, START, END, draws)
    else:
        module, parameters = language_model(kind)

        def write(parameters, embeds, mask, draws) -> Written:
            history = jnp.where(mask, 1, -1).astype(jnp.int32)
            return decoding.generate(module, parameters, embeds, mask, config, END, draws, history)

    compiled = jax.jit(write)
    return lambda *inputs: jax.tree.map(np.asarray, compiled(parameters, *inputs))


def draws(rows) -> Draws:
    return Draws(jax.random.key(7), jnp.asarray(rows, jnp.uint32))
