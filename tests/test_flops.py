"""Operations from sizes alone, against what traced programs ask for, XLA's count, and published figures."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from blip2_jax import ahead_of_time, flops
from blip2_jax.checkpoints import published
from blip2_jax.models.language.llama import Llama, LlamaConfig
from blip2_jax.models.language.opt import OPT, OPTConfig
from blip2_jax.models.language.t5 import T5, T5Config
from blip2_jax.models.layers import KeyValue
from blip2_jax.models.qformer import QFormer, QFormerConfig
from blip2_jax.models.vision.efficientnet_lite import EfficientNetLite
from blip2_jax.models.vision.vit import ViT, ViTConfig
from tests import tiny
from tests.test_configs import recipe

BATCH, QUERIES, TEXT, IMAGE = 3, 4, 7, 11
QFORMER = QFormerConfig(width=24, layers=5, heads=4, mlp_width=40, vocab_size=50, queries=QUERIES)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def executed(module, *arguments, method=None):
    """Operations of a module's pass, its initialisation left out."""
    variables = jax.eval_shape(lambda *arguments: module.init(jax.random.key(0), *arguments, method=method), *arguments)
    return flops.executed(lambda *arguments: module.apply(*arguments, method=method), variables, *arguments)


# Billions of multiply-additions for a picture of 224 pixels: those that timm lists for EVA-CLIP's ViT-g of 40 blocks
# and CLIP's ViT-L of 24, of which BLIP-2 leaves out the last.
@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda: flops.vit(ViT(published.TOWERS["eva_vit_g.pth"].config)), 267.2 * 39 / 40),
        (lambda: flops.vit(ViT(published.TOWERS["clip_vit_L.pth"].config)), 81.1 * 23 / 24),
    ],
)
def test_published_image_encoders(found, expected):
    assert found() / 2e9 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("class_token", [True, False])
def test_vit_is_exact(class_token):
    vit = ViT(ViTConfig(56, 14, 24, 3, 4, 40, class_token=class_token))
    assert flops.vit(vit) * BATCH == executed(vit, shape(BATCH, 56, 56, 3))


@pytest.mark.parametrize("side", [64, 50])
def test_efficientnet_is_exact(side):
    assert BATCH * flops.efficientnet(EfficientNetLite(), side) == executed(
        EfficientNetLite(), shape(BATCH, side, side, 3)
    )


def image():
    heads = shape(3, BATCH, IMAGE, QFORMER.heads, QFORMER.width // QFORMER.heads)
    return KeyValue(heads, heads)


def test_qformer_passes_are_exact():
    ids, mask = shape(BATCH, TEXT, dtype=jnp.int32), shape(BATCH, TEXT, dtype=bool)
    qformer = QFormer(QFORMER)
    queries = executed(qformer, image(), method="encode_queries")
    assert BATCH * flops.qformer_pass(QFORMER, QUERIES, 0, IMAGE) == queries
    assert BATCH * flops.qformer_pass(QFORMER, 0, TEXT) == executed(qformer, ids, mask, method="encode_text")
    pair = executed(qformer, image(), ids, mask, method="encode_pair")
    assert BATCH * flops.qformer_pass(QFORMER, QUERIES, TEXT, IMAGE) == pair
    projection = executed(qformer, shape(BATCH, IMAGE, 32), method="project_image")
    assert BATCH * flops.image_projection(QFORMER, IMAGE, 32) == projection

    def continued(model, image, ids, mask):
        query_output, cache = model.encode_queries(image)
        return query_output, model.decode_text(cache, ids, mask)

    both = queries + BATCH * (flops.qformer_pass(QFORMER, 0, TEXT, past=QUERIES) + 2 * TEXT * QFORMER.width**2)
    assert executed(qformer, image(), ids, mask, method=continued) == both


SIZES = {"vocab_size": 64, "width": 24, "layers": 3, "heads": 4, "head_size": 6, "mlp_width": 40}


@pytest.mark.parametrize(
    "model",
    [
        Llama(LlamaConfig(**SIZES, kv_heads=2)),
        Llama(LlamaConfig(**SIZES, kv_heads=4, tied_head=False)),
        OPT(OPTConfig(**SIZES, kv_heads=4)),
    ],
    ids=["grouped", "untied", "opt"],
)
def test_decoders_are_exact(model):
    ids = shape(BATCH, TEXT, dtype=jnp.int32)
    assert BATCH * flops.decoder(model, TEXT, TEXT) == executed(model, ids, method="initialize")


def test_t5_is_exact():
    model = T5(T5Config(64, 24, 2, 3, 4, 5, 40))
    ids = shape(BATCH, TEXT, dtype=jnp.int32)
    assert BATCH * flops.t5(model, TEXT, TEXT) == executed(model, ids, method="initialize")


def test_within_five_percent_of_what_xla_counts():
    """XLA counts loops once, so one layer, and everything that is no product, so a wide one."""
    vit = ViT(ViTConfig(224, 14, 512, 1, 8, 2048))
    picture = shape(1, 224, 224, 3)
    variables = jax.eval_shape(vit.init, jax.random.key(0), picture)
    counted = jax.jit(vit.apply).lower(variables, picture).compile().cost_analysis()["flops"]
    assert flops.vit(vit) == pytest.approx(counted, rel=0.05)


def test_executed_counts_rounds_branches_and_what_is_computed_again():
    x = shape(8, 8)
    product = 2 * 8**3

    def scanned(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=5)[0]

    def branched(x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    def remembered(x):
        return jnp.sin(jax.checkpoint(lambda x: jnp.sin(x @ x) @ x)(x)).sum()

    assert flops.executed(scanned, x) == 5 * product
    assert flops.executed(branched, x) == 2 * product
    assert flops.executed(lambda x: (x @ x, x + 1)[1], x) == 0
    # Two forward, four backward, and the inner product once more.
    assert flops.executed(jax.grad(remembered), x) == 7 * product
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(spec, jax.sharding.PartitionSpec()), out_specs=spec)
    assert flops.executed(mapped, x, x) == product


@pytest.mark.parametrize(("stage", "variant"), [("stage1", "eva_g"), ("stage2", "opt_2_7b"), ("stage2", "flan_t5_xl")])
def test_a_published_step(stage, variant):
    """The parts sum up to what the gradient of the real loss asks for, within five percent."""
    config = recipe(stage, variant)
    if stage == "stage2":
        config.llm_remat = False  # Which has the language model run forward once more.
    task = ahead_of_time.create_task(config, jnp.bfloat16)
    key = jax.eval_shape(lambda: jax.random.key(0))
    counted = flops.executed(task.value_and_gradients, task.shapes(), task.frozen_shapes(), task.schema(), key)
    assert flops.per_step(task) == pytest.approx(counted, rel=0.05)


def test_adapters_count_beside_what_they_adapt():
    config = recipe("stage2", "opt_2_7b")
    config.llm_remat = False
    config.lora.update({"rank": 64, "language": ".*", "qformer": ".*"})
    task = ahead_of_time.create_task(config, jnp.bfloat16)
    key = jax.eval_shape(lambda: jax.random.key(0))
    counted = flops.executed(task.value_and_gradients, task.shapes(), task.frozen_shapes(), task.schema(), key)
    assert flops.per_step(task) == pytest.approx(counted, rel=0.05)
    parts = {part.name: part for part in flops.parts(task)}
    # Of a layer's products with c.width inputs and outputs: rank x (inputs + outputs) instead of inputs x outputs.
    assert 0.02 < parts["adapters"].forward / parts["language model"].forward < 0.05
    assert parts["queries read the image"].passes == 2


def test_passes():
    """Once for the frozen encoder, twice for the language model, three times for the rest; and nothing for the encoder
    where image tokens are computed before."""
    config = recipe("stage2", "opt_2_7b")
    parts = {part.name: part for part in flops.parts(ahead_of_time.create_task(config, jnp.bfloat16))}
    passes = {name: part.passes for name, part in parts.items()}
    assert passes.pop("image encoder") == 1
    assert passes.pop("language model") == 2
    assert set(passes.values()) == {3}
    assert all(part.total == part.passes * part.forward for part in parts.values())
    config.data.feature_views = 4
    assert flops.parts(ahead_of_time.create_task(config, jnp.bfloat16))[0].name == "image projection"


def test_an_unknown_encoder_is_an_error(folder, own_cache):
    task = ahead_of_time.create_task(tiny.recipe("stage1", folder), None)
    encoder = dataclasses.replace(task.encoder, module=QFormer(QFORMER))
    with pytest.raises(ValueError, match="the operations of QFormer are not known"):
        flops.vision(encoder)
