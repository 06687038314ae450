"""Path tables."""

import jax.numpy as jnp
import pytest

from blip2_jax import params

TREE = {"qformer": {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}, "temperature": jnp.float32(0.07)}


def test_flatten_and_back():
    flat = params.flatten(TREE)
    assert list(flat) == ["qformer/layer/kernel", "qformer/layer/bias", "temperature"]
    assert params.unflatten(flat) == TREE


def test_the_first_full_match_wins():
    table = [(r".*/bias", False), (r"qformer/.*", True), (r".*", None)]
    assert params.flatten(params.resolve(table, TREE, "decay")) == {
        "qformer/layer/kernel": True,
        "qformer/layer/bias": False,
        "temperature": None,
    }


def test_a_partial_match_is_none():
    with pytest.raises(ValueError, match="decay table: no row matches the parameter 'qformer/layer/kernel'"):
        params.resolve([(r"qformer", True), (r".*bias|temp.*", True)], TREE, "decay")


def test_an_idle_row_is_an_error():
    with pytest.raises(ValueError, match=r"rate table: no parameter needs the rows \['llm/"):
        params.resolve([(r".*", 1.0), (r"llm/.*", 2.0)], TREE, "rate")


def test_count_size_and_description():
    assert params.count(TREE) == 10
    assert params.size(TREE) == 40
    text = params.describe(TREE, {"decays": params.resolve([(r".*", True)], TREE, "decay")})
    assert "qformer/layer/kernel  2x3" in text
    assert "10 parameters" in text


def test_the_fingerprint_is_of_paths_shapes_and_values():
    same = {"temperature": TREE["temperature"], "qformer": TREE["qformer"]}
    assert params.sha256(same) == params.sha256(TREE)
    changed = [
        TREE | {"temperature": jnp.float32(0.08)},
        TREE | {"qformer": {"layer": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(3)}}},
        {"qformer": TREE["qformer"], "divisor": TREE["temperature"]},
    ]
    assert len({params.sha256(tree) for tree in [TREE, *changed]}) == 4
