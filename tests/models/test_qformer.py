"""The Q-Former: who sees whom, and that the passes agree with each other."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax import params
from blip2_jax.models.qformer import AttentionPattern, QFormer, QFormerConfig, attention_mask

Q, T, B, P, D_IMAGE = 3, 5, 2, 4, 7
SMALL = {"width": 16, "heads": 4, "mlp_width": 32, "vocab_size": 21, "max_positions": 12, "queries": Q, "dropout": 0.0}


def drawn(mask):
    """A mask as rows of 0 and 1, so that a failure shows what is wrong."""
    return "\n".join(" ".join("01"[bool(cell)] for cell in row) for row in np.asarray(mask))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (AttentionPattern.UNIMODAL, ["1 1 0 0 0", "1 1 0 0 0", "0 0 1 1 1", "0 0 1 1 1", "0 0 1 1 1"]),
        (AttentionPattern.BIDIRECTIONAL, ["1 1 1 1 1"] * 5),
        (AttentionPattern.CAUSAL, ["1 1 0 0 0", "1 1 0 0 0", "1 1 1 0 0", "1 1 1 1 0", "1 1 1 1 1"]),
    ],
)
def test_attention_patterns(pattern, expected):
    mask = attention_mask(pattern, 2, jnp.ones((1, 3), bool))
    chex.assert_shape(mask, (1, 1, 5, 5))
    found, wanted = drawn(mask[0, 0]), "\n".join(expected)
    assert found == wanted, f"{pattern} is\n{found}\nbut should be\n{wanted}"


def test_padding_is_never_seen():
    mask = attention_mask(AttentionPattern.BIDIRECTIONAL, 2, jnp.array([[True, False, False]]))
    assert drawn(mask[0, 0]) == "\n".join(["1 1 1 0 0"] * 5), drawn(mask[0, 0])


def every_pass(model, image_embeds, ids, mask):
    image = model.project_image(image_embeds)
    queries, cache = model.encode_queries(image)
    return {
        "queries": queries,
        "text": model.encode_text(ids, mask),
        "pair": model.encode_pair(image, ids, mask)[0],
        "decoded": model.decode_text(cache, ids, mask)[0],
    }


@functools.cache
def passes(config):
    """Every pass of a configuration, compiled once."""
    return jax.jit(functools.partial(QFormer(config).apply, method=every_pass))


@pytest.fixture(
    scope="module",
    params=[(4, 2), (3, 2), (5, 3), (1, 2)],
    ids=lambda layers: f"{layers[0]}layers_cross_every{layers[1]}",
)
def qformer(request):
    layers, every = request.param
    config = QFormerConfig(layers=layers, cross_attention_every=every, **SMALL)
    keys = jax.random.split(jax.random.key(0), 2)
    inputs = (
        jax.random.normal(keys[0], (B, P, D_IMAGE)),
        jax.random.randint(keys[1], (B, T), 0, 21),
        jnp.array([[True] * T, [True] * 3 + [False] * 2]),
    )
    variables = jax.jit(functools.partial(QFormer(config).init, method=every_pass))(jax.random.key(1), *inputs)
    # Larger than at initialisation, so that every path has a visible influence.
    variables = jax.tree.map(lambda x: x * 5 + 0.1 * jax.random.normal(jax.random.key(2), x.shape), variables)
    return config, variables, inputs


def test_shapes(qformer):
    config, variables, inputs = qformer
    outputs = passes(config)(variables, *inputs)
    chex.assert_shape([outputs["queries"], outputs["pair"]], (B, Q, 16))
    chex.assert_shape([outputs["text"], outputs["decoded"]], (B, T, 16))
    image = QFormer(config).apply(variables, inputs[0], method="project_image")
    chex.assert_shape(image, (-(-config.layers // config.cross_attention_every), B, P, 4, 4))
    chex.assert_tree_all_finite(outputs)


def test_padding_changes_nothing(qformer):
    config, variables, (image, ids, mask) = qformer
    outputs = passes(config)(variables, image, ids, mask)
    other = passes(config)(variables, image, jnp.where(mask, ids, 20), mask)
    for name in ("queries", "pair"):
        chex.assert_trees_all_equal(outputs[name], other[name])
    for name in ("text", "decoded"):
        chex.assert_trees_all_equal(outputs[name][mask], other[name][mask])


def test_queries_alone_see_no_text_and_text_alone_no_image(qformer):
    config, variables, (image, ids, mask) = qformer
    apply = lambda image, ids: passes(config)(variables, image, ids, mask)
    outputs, other_text, other_image = apply(image, ids), apply(image, (ids + 1) % 21), apply(image + 1, ids)
    chex.assert_trees_all_equal(outputs["queries"], other_text["queries"])
    chex.assert_trees_all_equal(outputs["text"], other_image["text"])
    assert not np.allclose(outputs["pair"], other_image["pair"])
    if config.layers > 1:  # In a single layer text meets the queries only before they have seen the image.
        assert not np.allclose(outputs["pair"], other_text["pair"])
        assert not np.allclose(outputs["decoded"], other_image["decoded"])


def test_decoding_is_causal(qformer):
    config, variables, (image, ids, _) = qformer
    mask = jnp.ones((B, T), bool)
    apply = lambda ids: passes(config)(variables, image, ids, mask)["decoded"]
    changed = apply(ids.at[:, 3].add(1) % 21)
    chex.assert_trees_all_equal(apply(ids)[:, :3], changed[:, :3])
    assert not np.allclose(apply(ids)[:, 3:], changed[:, 3:])


def test_the_cache_equals_one_pass_with_the_causal_pattern(qformer):
    """ITG with cached queries is the multimodal causal mask of the paper's figure 2 over [queries; text]."""
    config, variables, (image_embeds, ids, text_mask) = qformer

    def whole(model):
        image = model.project_image(image_embeds)
        hidden = (model._embed_queries(B, True), model._embed_text(ids, True))
        mask = attention_mask(AttentionPattern.CAUSAL, Q, text_mask)
        (_, text), _ = model.transformer(hidden, mask, image, None, None)
        return model.lm_head(text)[0]

    cached = passes(config)(variables, image_embeds, ids, text_mask)["decoded"]
    expected = jax.jit(functools.partial(QFormer(config).apply, method=whole))(variables)
    np.testing.assert_allclose(cached[text_mask], expected[text_mask], rtol=1e-4, atol=1e-4)


def test_both_single_passes_equal_one_with_the_unimodal_pattern(qformer):
    config, variables, (image_embeds, ids, text_mask) = qformer

    def whole(model):
        image = model.project_image(image_embeds)
        hidden = (model._embed_queries(B, True), model._embed_text(ids, True))
        mask = attention_mask(AttentionPattern.UNIMODAL, Q, text_mask)
        return model.transformer(hidden, mask, image, None, None)[0]

    outputs = passes(config)(variables, image_embeds, ids, text_mask)
    queries, text = jax.jit(functools.partial(QFormer(config).apply, method=whole))(variables)
    np.testing.assert_allclose(outputs["queries"], queries, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outputs["text"][text_mask], text[text_mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [{"remat": True}, {"unroll": 2}])
def test_remat_and_unrolling_change_no_gradient(change):
    config = QFormerConfig(layers=4, cross_attention_every=2, **SMALL)
    image, ids = jnp.ones((B, P, D_IMAGE)), jnp.ones((B, T), int)
    mask = jnp.ones((B, T), bool)
    init = jax.jit(functools.partial(QFormer(config).init, method=every_pass))
    variables = init(jax.random.key(1), image, ids, mask)

    def gradients(config):
        def loss(variables):
            outputs = QFormer(config).apply(variables, image, ids, mask, method=every_pass)
            return sum(jnp.sin(x).sum() for x in outputs.values())

        return jax.jit(jax.grad(loss))(variables)

    changed = QFormerConfig(layers=4, cross_attention_every=2, **(SMALL | change))
    chex.assert_trees_all_close(gradients(config), gradients(changed), rtol=1e-4, atol=1e-4)


def test_stage_two_has_no_text_parameters():
    config = QFormerConfig(layers=3, cross_attention_every=2, **SMALL)

    def queries_only(model, image_embeds):
        return model.encode_queries(model.project_image(image_embeds))[0]

    tree = QFormer(config).init(jax.random.key(0), jnp.ones((B, P, D_IMAGE)), method=queries_only)["params"]
    assert not [path for path in params.flatten(tree) if "text_mlp" in path or "word" in path or "lm_head" in path]


def test_text_longer_than_the_positions_is_an_error():
    config = QFormerConfig(layers=1, **SMALL)
    ids = jnp.ones((1, 13), int)
    with pytest.raises(ValueError, match="13 tokens, but the Q-Former has 12 positions"):
        QFormer(config).init(jax.random.key(0), ids, jnp.ones((1, 13), bool), method="encode_text")


@pytest.mark.parametrize("cross", ["with the text FFN", "without"])
def test_published_parameter_counts(cross):
    """The paper's Q-Former for ViT-g, to the unit: 185,660,160 with its text side, 105,137,664 in stage 2."""
    config = QFormerConfig()
    image = jax.ShapeDtypeStruct((1, 2, 1408), jnp.float32)
    ids, mask = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), jnp.bool_)

    def queries_only(model, image_embeds):
        return model.encode_queries(model.project_image(image_embeds))[0]

    if cross == "without":
        init = lambda image: QFormer(config).init(jax.random.key(0), image, method=queries_only)
        tree = jax.eval_shape(init, image)["params"]
        assert params.count(tree) - params.count({"q": tree["query_tokens"]}) == 105_137_664
    else:
        init = lambda *inputs: QFormer(config).init(jax.random.key(0), *inputs, method=every_pass)
        tree = jax.eval_shape(init, image, ids, mask)["params"]
        head = params.count(tree["lm_head"])
        assert head == 622_651
        assert params.count(tree) - head - params.count({"q": tree["query_tokens"]}) == 185_660_160
