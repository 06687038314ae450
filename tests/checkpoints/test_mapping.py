"""Foreign tensors there and back, and what a file has beside what a model needs."""

import numpy as np
import pytest

from blip2_jax import params
from blip2_jax.checkpoints import mapping
from blip2_jax.checkpoints.mapping import Foreign, as_is, convolution, flat, leading, linear


class Arrays(dict):
    where = "a test"

    def names(self):
        return list(self)

    def read(self, name):
        return self[name]


TABLE = [
    (r"token", Foreign("token", leading(2))),
    (r"patch", Foreign("conv.weight", convolution())),
    (r"layers/qkv/kernel", Foreign(("h.{layer}.q", "h.{layer}.k", "h.{layer}.v"), linear(), pieces=1)),
    (r"layers/qkv/bias", Foreign(("h.{layer}.q_bias", None, "h.{layer}.v_bias"), flat())),
    (r"layers/(output)/kernel", Foreign("h.{layer}.{0}", linear(inputs=2))),
    (r"image/kernel", Foreign("h.{layer}.cross", linear(), stacked=1)),
    (r"norm/scale", Foreign("norm", as_is())),
]
SHAPES = {
    "token": (6,),
    "patch": (3, 2, 5, 6),
    "layers/qkv/kernel": (2, 6, 3, 2, 3),
    "layers/qkv/bias": (2, 3, 2, 3),
    "layers/output/kernel": (2, 2, 3, 6),
    "image/kernel": (7, 2, 2, 3),
    "norm/scale": (6,),
}


def layers_of(path):
    return range(1, 5, 2) if path.startswith(("layers/", "image/")) else None


@pytest.fixture
def tree(rng):
    flat_tree = {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    flat_tree["layers/qkv/bias"][:, 1] = 0
    return params.unflatten(flat_tree)


def test_there_and_back(tree):
    mapped = mapping.resolve(tree, TABLE, layers_of, "model.")
    tensors = Arrays(mapping.export(tree, mapped))
    assert {name: array.shape for name, array in tensors.items()} == mapping.names(mapped)
    assert tensors["model.token"].shape == (1, 1, 6)
    assert tensors["model.conv.weight"].shape == (6, 5, 3, 2)
    assert tensors["model.h.3.output"].shape == (6, 6)
    np.testing.assert_array_equal(tensors["model.h.3.cross"], tree["image"]["kernel"][:, 1].reshape(7, 6).T)
    np.testing.assert_array_equal(tensors["model.h.1.k"], tree["layers"]["qkv"]["kernel"][0, :, 1].reshape(6, 6).T)
    assert not [name for name in tensors if "h.0" in name or "h.2" in name]
    again = params.flatten(mapping.load(tree, mapped, tensors))
    for path, leaf in params.flatten(tree).items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


def test_a_tensor_that_is_missing_or_of_another_shape(tree):
    mapped = mapping.resolve(tree, TABLE, layers_of)
    tensors = Arrays(mapping.export(tree, mapped))
    wrong = Arrays(tensors | {"h.1.output": np.zeros((6, 7))})
    with pytest.raises(ValueError, match=r"a test: tensor 'h.1.output' has shape \(6, 7\), .* needs \(6, 6\)"):
        mapping.load(tree, mapped, wrong)
    del tensors["norm"]
    with pytest.raises(ValueError, match="a test: no tensor 'norm', which 'norm/scale' needs"):
        mapping.load(tree, mapped, tensors)


def test_the_report_says_what_is_left_aside(tree):
    needed = mapping.names(mapping.resolve(tree, TABLE, layers_of))
    found = [*needed, "buffer", "stray"]
    found.remove("norm")
    report = mapping.account(found, needed, [("buf.*", "a buffer")])
    assert report.expected == {"buffer": "a buffer"}
    assert report.unexpected == ["stray"]
    assert report.missing == ["norm"]
    assert len(report.loaded) == len(needed) - 1
