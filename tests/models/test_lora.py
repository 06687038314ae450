"""LoRA is W + alpha / rank * A B wherever a model is applied, without the sum or a gradient of its size."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax import params
from blip2_jax.checkpoints import language
from blip2_jax.decoding import GenerationConfig, generate
from blip2_jax.models import lora
from blip2_jax.models.blip2 import Blip2Config, ImageTextModel, SoftPromptModel
from blip2_jax.models.language.llama import Llama, LlamaConfig
from blip2_jax.models.language.opt import OPT, OPTConfig
from blip2_jax.models.language.t5 import T5, T5Config
from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.parallel import mesh as meshes
from blip2_jax.parallel import sharding
from blip2_jax.tasks.stage1_loss import Stage1Loss
from blip2_jax.tasks.stage2_loss import Stage2Loss

BATCH, VOCABULARY, WIDTH, MLP, RANK = 8, 30, 16, 28, 2
QFORMER = QFormerConfig(width=16, layers=3, heads=2, mlp_width=20, vocab_size=20, max_positions=8, queries=3)
MODELS = {
    "opt": OPT(OPTConfig(VOCABULARY, WIDTH, 2, 2, 2, 8, MLP, max_positions=32)),
    "llama": Llama(LlamaConfig(VOCABULARY, WIDTH, 2, 4, 2, 4, MLP)),
    "t5": T5(T5Config(VOCABULARY, WIDTH, 2, 2, 2, 8, MLP)),
}
SETTINGS = lora.Settings(RANK, 6.0, language=".*", qformer=".*")
EVERY = pytest.mark.parametrize("kind", [*MODELS, "stage1"])


def noisy(tree, size=0.1):
    noise = lambda path, x: x + size * jax.random.normal(jax.random.key(len(path)), x.shape)
    return params.map_paths(noise, tree)


def build(kind, changes=(), **settings):
    """The loss of a kind; `changes` are of the configuration of the models inside."""
    changes = dict(changes)
    qformer, encode = dataclasses.replace(QFORMER, **changes), lambda parameters, image: image
    if kind == "stage1":
        model = ImageTextModel(Blip2Config(qformer, embed_width=8))
        return Stage1Loss(model, encode, VOCABULARY - 11, lora_scale=SETTINGS.scale, **settings)
    model = dataclasses.replace(MODELS[kind].config, **changes)
    spoken = MODELS[kind].clone(config=model)
    return Stage2Loss(
        SoftPromptModel(Blip2Config(qformer), WIDTH), spoken, encode, (3,), lora_scale=SETTINGS.scale, **settings
    )


def initialize(kind, key):
    """The parameters of the model of a stage."""
    model, image, ids = build(kind).model, jnp.zeros((2, 5, 12)), jnp.zeros((2, 4), jnp.int32)
    if kind != "stage1":
        return model.init(key, image)["params"]

    def every_pass(model):
        projected = model.project_image(image)
        cache = model.image_features(projected).cache
        model.text_features(ids, ids == 0)
        model.match(projected, ids, ids == 0)
        model.caption_features(cache, ids, ids == 0)

    return model.init(key, method=every_pass)["params"]


@functools.cache
def problem(kind):
    """Adapters that do something, what they stand beside, and a batch."""
    rng, key = np.random.default_rng(0), jax.random.key(1)
    start = functools.partial(initialize, kind)
    whole, bases = noisy(jax.jit(start)(key)), {"qformer": lora.adaptable(start, "qformer")}
    frozen = {"qformer": whole.pop("qformer")}
    batch = {"image_embeds": rng.normal(size=(BATCH, 5, 12)).astype(np.float32), "example_mask": np.ones(BATCH, bool)}
    texts = {"text": 6} if kind == "stage1" else {"prompt": 4, "target": 6}
    for name, length in texts.items():
        batch[f"{name}_ids"] = rng.integers(0, 20, (BATCH, length)).astype(np.int32)
        batch[f"{name}_mask"] = np.arange(length) < rng.integers(1, length + 1, (BATCH, 1))
    if kind == "stage1":
        batch |= {name: np.stack([np.arange(BATCH, dtype=np.uint32)] * 2, 1) for name in ("image_id", "text_id")}
    else:
        speak = functools.partial(language.initialize, MODELS[kind])
        bases["language"], frozen["language"] = lora.adaptable(speak), noisy(jax.jit(speak)(key))
    begun = {part: lora.fresh(key, part, base, SETTINGS) for part, base in bases.items()}
    return whole | {"lora": begun}, frozen, batch


def moved(kind):
    """The same, with adapters that have learnt something."""
    trainable, frozen, batch = problem(kind)
    return trainable | {"lora": noisy(trainable["lora"])}, frozen, batch


def merged(trainable, frozen):
    """As one without adapters would have these weights."""
    trainable, frozen = lora.assemble(trainable, frozen, SETTINGS.scale)
    return lora.merge(trainable), lora.merge(frozen)


def scalar(loss):
    """The number alone."""
    return lambda *inputs: (
        loss.loss(*inputs, jax.random.key(5))[0]
        if isinstance(loss, Stage1Loss)
        else (loss.loss(*inputs, jax.random.key(5)))
    )


def quiet(kind, changes=(), **settings):
    """Without dropout, which adapters and kernels would have in common anyway."""
    loss = build(kind, changes, **settings)
    own = dataclasses.replace(loss.model.config.qformer, dropout=0.0, attention_dropout=0.0)
    return dataclasses.replace(loss, model=loss.model.clone(config=dataclasses.replace(loss.model.config, qformer=own)))


def assert_close(found, wanted):
    chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * max(1.0, np.abs(theirs).max()))


def of_merged(kind):
    """The loss of weights into which adapters are merged, as a function of the adapters."""
    return lambda trainable, frozen, batch: scalar(quiet(kind))(*merged(trainable, frozen), batch)


@EVERY
def test_every_matrix_has_an_adapter_that_begins_as_nothing(kind):
    trainable, frozen, batch = problem(kind)
    for part, adapters in trainable["lora"].items():
        kernels = {path for path in params.flatten(frozen[part]) if path.endswith("/kernel")}
        assert {path.rpartition("/")[0] + "/kernel" for path in params.flatten(adapters)} == kernels
    bare = dataclasses.replace(quiet(kind), lora_scale=0.0)
    without = {name: tree for name, tree in trainable.items() if name != "lora"} | {"qformer": frozen["qformer"]}
    run = jax.jit(scalar(bare))
    assert jax.jit(scalar(quiet(kind)))(trainable, frozen, batch) == run(without, frozen, batch)
    assert jax.jit(scalar(quiet(kind)))(*moved(kind)) != run(without, frozen, batch)


@EVERY
@pytest.mark.parametrize("changes", [(), (("remat", True), ("unroll", 2))], ids=["plain", "remat and unroll"])
def test_loss_and_gradient_are_those_of_merged_weights(kind, changes):
    trainable, frozen, batch = moved(kind)
    wanted = jax.jit(jax.value_and_grad(of_merged(kind)))(trainable, frozen, batch)
    pieces = {} if kind == "stage1" else {"pieces": 2}
    found = jax.jit(quiet(kind, changes, **pieces).value_and_gradients)(trainable, frozen, batch, jax.random.key(5))
    loss = found[0][0] if kind == "stage1" else found[0]
    np.testing.assert_allclose(loss, wanted[0], rtol=1e-5)
    assert_close(found[1], wanted[1])


def test_pieces_of_stage_1_have_the_gradient_of_the_whole():
    trainable, frozen, batch = moved("stage1")
    run = lambda **settings: jax.jit(quiet("stage1", **settings).value_and_gradients)(
        trainable, frozen, batch, jax.random.key(5)
    )
    assert_close(run(pieces=4), run())


@EVERY
def test_every_mesh_has_the_same_loss_and_gradient(kind):
    trainable, frozen, batch = moved(kind)
    run = jax.jit(quiet(kind).value_and_gradients)
    expected = run(trainable, frozen, batch, jax.random.key(5))
    mesh = meshes.make_mesh("data=2,fsdp=2,tensor=2", jax.devices()[:8])
    trees = [jax.device_put(tree, sharding.shardings(tree, mesh)) for tree in (trainable, frozen)]
    divided = {path for path, leaf in params.flatten(trees[0]["lora"]).items() if not leaf.sharding.is_fully_replicated}
    assert {"/".join(path.split("/")[-2:]) for path in divided} > {"query/lora_a", "query/lora_b", "output/lora_a"}
    with jax.set_mesh(mesh):
        found = run(*trees, jax.device_put(batch, meshes.batch_sharding(mesh)), jax.random.key(5))
    assert_close(jax.device_get(found), jax.device_get(expected))


def products(text):
    """Shapes of the results of all matrix products of a compiled program."""
    return {tuple(map(int, shape.split(","))) for shape in re.findall(r"= f32\[([\d,]+)\][^ ]* dot\(", text)}


@EVERY
def test_no_product_has_the_size_of_an_adapted_matrix(kind):
    """Neither W + A B nor its gradient is formed; merged weights, the control, form both."""
    trainable, frozen, batch = moved(kind)
    # Sizes that no product of activations has: what the feed-forwards of this Q-Former and language model have.
    sizes = {(16, 20), (20, 16)} if kind == "stage1" else {(WIDTH, MLP), (MLP, WIDTH)}
    compiled = lambda function, *inputs: jax.jit(function).lower(*inputs).compile().as_text()
    found = compiled(quiet(kind).value_and_gradients, trainable, frozen, batch, jax.random.key(5))
    assert not {shape[-2:] for shape in products(found)} & sizes
    assert {shape[-2:] for shape in products(compiled(jax.grad(of_merged(kind)), trainable, frozen, batch))} & sizes


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_what_is_written_is_what_merged_weights_write(kind):
    trainable, frozen, _ = moved(kind)
    model, config = MODELS[kind], GenerationConfig(6)
    adapted = lora.attach(frozen["language"], trainable["lora"]["language"], SETTINGS.scale)
    embeds = jax.random.normal(jax.random.key(2), (3, 4, WIDTH))
    write = jax.jit(lambda tree: generate(model, tree, embeds, jnp.ones((3, 4), bool), config, VOCABULARY).tokens)
    found = write(adapted)
    np.testing.assert_array_equal(found, write(lora.merge(adapted)))
    assert (found != write(frozen["language"])).any()
    # A bound model knows its adapters, too.
    positions = jnp.broadcast_to(jnp.arange(4), (3, 4))
    run = lambda tree: model.bind({"params": tree})(embeds, positions, jnp.ones((1, 1, 4, 4), bool))[0]
    np.testing.assert_allclose(run(adapted), run(lora.merge(adapted)), atol=1e-5)


def test_an_adapter_begins_as_peft_begins_it_whatever_else_is_adapted():
    base = lora.adaptable(functools.partial(language.initialize, MODELS["llama"]))
    few = dataclasses.replace(SETTINGS, language="layers/(query|down)")
    key = jax.random.key(0)
    some, every = (params.flatten(lora.fresh(key, "language", base, settings)) for settings in (few, SETTINGS))
    assert set(some) == {f"layers/{name}/lora_{side}" for name in ("query", "down") for side in "ab"}
    assert some["layers/query/lora_a"].shape == (2, WIDTH, RANK)
    assert some["layers/query/lora_b"].shape == (2, RANK, 4, 4)
    for path, leaf in some.items():
        np.testing.assert_array_equal(leaf, every[path])
        if path.endswith("b"):
            assert not leaf.any()
        else:  # Uniform up to 1 / sqrt(inputs).
            assert 0.5 < np.abs(leaf).max() * np.sqrt(leaf.shape[1]) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": -1}, r"lora\.rank = -1: expected at least 1, or 0 to adapt nothing"),
        ({"alpha": 0.0}, r"lora\.alpha = 0.0: expected a number above 0"),
        ({"rank": 8}, r"lora\.rank = 8 with nothing to adapt: name targets"),
        ({"qformer": ".*"}, r"lora\.rank = 0 with lora\.qformer = '\.\*': set lora\.rank"),
        ({"rank": 8, "qformer": "("}, r"lora\.qformer = '\(' is no regular expression"),
        ({"rank": 8, "language": ".*"}, r"lora\.language = '\.\*', but this task has no such part"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    config = lora.block()
    config.update(changes)
    with pytest.raises(ValueError, match=message):
        lora.resolve(config, ("qformer",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language": "layers/qery"}, r"lora\.language = 'layers/qery' matches no matrix; there are layers/"),
        ({"rank": 9}, r"lora\.rank = 9, but the language's layers/key is a matrix of 16 x 8"),
    ],
)
def test_targets_that_do_not_fit(changes, message):
    base = lora.adaptable(functools.partial(language.initialize, MODELS["llama"]))
    with pytest.raises(ValueError, match=message):
        lora.fresh(jax.random.key(0), "language", base, dataclasses.replace(SETTINGS, **changes))
