"""How parameters lie on a mesh: the table covers every model, what does not divide is whole, heads are split whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from blip2_jax import params
from blip2_jax.checkpoints import frozen, language
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
