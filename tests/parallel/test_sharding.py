"""How parameters lie on a mesh: the table covers every model, what does not divide is whole, heads are split whole."""

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from blip2_jax import params, tasks
from blip2_jax.checkpoints import frozen, language, mapping, published
from blip2_jax.checkpoints.huggingface import complete
from blip2_jax.checkpoints.store import TrainState
from blip2_jax.models.vision.vit import ViT, ViTConfig
from blip2_jax.parallel import mesh as meshes
from blip2_jax.parallel import sharding
from tests import tiny

MESH = "data=2,fsdp=2,tensor=2"


def specs(tree, mesh=MESH, devices=8):
    return params.flatten(sharding.specs(tree, meshes.abstract_mesh(mesh, devices)))


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("layers/query/kernel", (2, 8, 4, 3), (None, "fsdp", "tensor", None)),
        ("layers/query/kernel", (2, 8, 3, 4), (None, "fsdp", None, None)),
        ("layers/query/kernel", (2, 7, 4, 3), (None, None, "tensor", None)),
        ("blocks/qkv/bias", (2, 3, 4, 5), (None, None, "tensor", None)),
        ("qformer/transformer/tail/layer_0/query_mlp/output/kernel", (16, 8), ("tensor", "fsdp")),
        ("layers/output/kernel", (2, 4, 3, 8), (None, "tensor", None, "fsdp")),
        ("qformer/word_embeddings/embedding", (30523, 768), (None, "fsdp")),
        ("encoder_bias/buckets/embedding", (8, 4), (None, "tensor")),
        ("norm/scale", (8,), (None,)),
        ("temperature", (), ()),
    ],
)
def test_rows_of_the_table(path, shape, expected):
    assert specs(params.unflatten({path: leaf(*shape)})) == {path: PartitionSpec(*expected)}


def test_a_model_is_read_into_its_place(tmp_path):
    """Leaf by leaf, each device keeping its part; together the parts are what one device would hold."""
    part = frozen.find("llm", f"hf:{tiny.llama(tmp_path / 'llama')}")
    model = frozen.language_model(part, np.float32)
    mesh = meshes.make_mesh(MESH, jax.devices()[:8])
    place = sharding.placer(language.shapes(model, np.float32), mesh)
    spread = params.flatten(frozen.load_language_model(part, model, np.float32, place))
    whole = params.flatten(frozen.load_language_model(part, model, np.float32))
    expected = params.flatten(sharding.specs(params.unflatten(whole), mesh))
    for path, array in spread.items():
        assert array.sharding.spec == expected[path], path
        np.testing.assert_array_equal(array, whole[path], err_msg=path)
    kernel = spread["layers/up/kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 10, 22)


def shapes(init, *arguments, **options):
    return jax.eval_shape(functools.partial(init, **options), jax.random.key(0), *arguments)["params"]


def vit(**changes):
    config = ViTConfig(**changes)
    return shapes(ViT(config).init, jnp.zeros((1, config.image_size, config.image_size, 3)))


def llm(config):
    family = language.family(config)
    return language.shapes(family.module(family.config(config, dtype=jnp.bfloat16)), jnp.bfloat16)


def trained(stage, variant):
    recipe = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "configs" / f"{stage}.py"))["get_config"](variant)
    return tasks.create(recipe).shapes()


def efficientnet():
    encoder = frozen.vision_encoder(frozen.find("vision", "nano:"), 160, jnp.float32)
    return mapping.template(encoder.init)


QWEN = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 2,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
}
# Every model of the registry: its parameters, and those of more than a million scalars that may be whole everywhere.
MODELS = {
    "EVA-CLIP ViT-g": lambda: vit(),
    "CLIP ViT-L": lambda: vit(width=1024, layers=23, mlp_width=4096, patch_bias=False, pre_norm=True),
    "SigLIP": lambda: vit(width=1152, layers=27, mlp_width=4304, class_token=False, final_norm=True),
    "EfficientNet-Lite0": efficientnet,
    "OPT-2.7B": lambda: llm(published.config("facebook/opt-2.7b")),
    "Vicuna-7B": lambda: llm(published.config("lmsys/vicuna-7b-v1.1")),
    "Qwen 2.5": lambda: llm(complete(QWEN)),
    "Flan-T5-XL": lambda: llm(published.config("google/flan-t5-xl")),
    "stage 1, ViT-g": lambda: trained("stage1", "eva_g"),
    "stage 2, OPT-2.7B": lambda: trained("stage2", "opt_2_7b"),
    "stage 2, Flan-T5-XL": lambda: trained("stage2", "flan_t5_xl"),
    "stage 2, InstructBLIP": lambda: trained("stage2", "instruct_vicuna_7b"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_table_covers_every_leaf_of_every_model(name):
    """Each by a row of its own, and what is large is divided."""
    tree = MODELS[name]()
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in params.flatten(tree).items()}
    spread = {path for path, spec in specs(tree, "data=2,fsdp=2,tensor=2").items() if any(spec)}
    if name != "EfficientNet-Lite0":  # All of it is smaller than a language model's smallest matrix.
        whole = {path for path, size in sizes.items() if size > 1_000_000} - spread
        assert not whole
    assert set(specs(tree)) == set(sizes)


def test_a_leaf_that_no_row_knows_is_an_error():
    with pytest.raises(ValueError, match="sharding table: no row matches the parameter 'qformer/novelty'"):
        specs({"qformer": {"novelty": leaf(8, 8)}})


@pytest.mark.parametrize("sharded", [True, False])
def test_moments_lie_like_their_parameters(sharded):
    mesh = meshes.make_mesh(MESH)
    trainable = {
        "qformer": {"layers": {"query": {"kernel": leaf(2, 8, 4, 3), "bias": leaf(2, 4, 3)}}},
        "vision_proj": {"kernel": leaf(8, 4), "bias": leaf(4)},
        "temperature": leaf(),
    }
    state = jax.eval_shape(
        lambda tree: TrainState(jnp.int32(0), jax.random.key(0), tree, optax.adamw(1e-3).init(tree)), trainable
    )
    places = sharding.state_shardings(state, mesh, sharded)
    assert jax.tree.structure(places) == jax.tree.structure(state)
    expected = params.flatten(sharding.shardings(trainable, mesh))
    if not sharded:
        expected = dict.fromkeys(expected, meshes.replicated(mesh))
    for tree in (places.trainable, places.optimizer[0].mu, places.optimizer[0].nu):
        assert params.flatten(tree) == expected
    for alone in (places.step, places.rng, places.skipped, places.optimizer[0].count):
        assert alone == meshes.replicated(mesh)
    assert any(any(place.spec) for place in expected.values()) == sharded
