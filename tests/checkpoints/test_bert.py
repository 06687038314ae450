"""A Q-Former from a BERT: what is taken over, what is copied twice, what starts fresh."""

import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from blip2_jax import params
from blip2_jax.checkpoints.bert import has_language_head, initialize_qformer, qformer_config
from blip2_jax.checkpoints.huggingface import Directory
from blip2_jax.models.qformer import QFormer
from tests import tiny


def fresh_qformer(config):
    image = jnp.zeros((1, 4, 10))
    ids, mask = jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)

    def every_pass(module):
        projected = module.project_image(image)
        _, cache = module.encode_queries(projected)
        module.encode_text(ids, mask)
        module.decode_text(cache, ids, mask)

    return QFormer(config).init(jax.random.key(0), method=every_pass)["params"]


@pytest.fixture(scope="module", params=[False, True], ids=["bare", "with language head"])
def bert(request, tmp_path_factory):
    return Directory(tiny.bert(tmp_path_factory.mktemp("bert") / "b", layers=3, head=request.param))


@pytest.fixture(scope="module")
def start(bert):
    config = qformer_config(bert.config(), queries=5, cross_attention_every=2)
    fresh = fresh_qformer(config)
    return config, params.flatten(fresh), params.flatten(initialize_qformer(fresh, bert, config))


def test_sizes_come_from_the_config(start):
    config, _, _ = start
    assert (config.width, config.layers, config.heads, config.vocab_size, config.max_positions) == (24, 3, 4, 17, 16)
    assert (config.dropout, config.norm_epsilon) == (0.1, 1e-12)


def test_both_feed_forwards_are_copies_of_berts(start, bert):
    _, _, flat = start
    for place, layer in (("groups/layer_0", 0), ("groups/layer_1", 1), ("tail/layer_0", 2)):
        expected = bert.read(next(n for n in bert.names() if n.endswith(f"layer.{layer}.intermediate.dense.weight"))).T
        for mlp in ("query_mlp", "text_mlp"):
            kernel = np.asarray(flat[f"transformer/{place}/{mlp}/intermediate/kernel"])
            chex.assert_trees_all_equal(kernel[0] if place.startswith("groups") else kernel, expected)


def test_the_vocabulary_grows_by_a_fresh_row(start, bert):
    _, fresh, flat = start
    old = bert.read(next(name for name in bert.names() if name.endswith("word_embeddings.weight")))
    new = np.asarray(flat["word_embeddings/embedding"])
    chex.assert_trees_all_equal(new[:-1], old)
    chex.assert_trees_all_equal(new[-1], np.asarray(fresh["word_embeddings/embedding"])[-1])


def test_what_bert_lacks_stays_fresh(start, bert):
    _, fresh, flat = start
    same = {path for path in flat if np.array_equal(flat[path], fresh[path])}
    expected = {p for p in flat if "cross_attention" in p or "image_projection" in p or p == "query_tokens"}
    if not has_language_head(bert):
        expected |= {p for p in flat if p.startswith("lm_head")}
    assert same == expected


def test_a_token_type_is_added_on_request(start, bert):
    config, fresh, flat = start
    kept = initialize_qformer(params.unflatten(fresh), bert, config, keep_token_type=True)
    row = bert.read(next(name for name in bert.names() if name.endswith("token_type_embeddings.weight")))[0]
    expected = flat["position_embeddings/embedding"] + row
    chex.assert_trees_all_close(kept["position_embeddings"]["embedding"], expected)


def test_stage_two_needs_no_text(bert):
    config = qformer_config(bert.config(), queries=5)
    module = QFormer(config)
    run = lambda module: module.encode_queries(module.project_image(jnp.zeros((1, 4, 10))))
    fresh = module.init(jax.random.key(0), method=run)["params"]
    chex.assert_trees_all_equal_shapes(initialize_qformer(fresh, bert, config), fresh)


def test_what_is_no_bert_is_refused(bert):
    with pytest.raises(ValueError, match="expected a BERT with exact GELU, found model_type 'llama'"):
        qformer_config(bert.config() | {"model_type": "llama"})
    with pytest.raises(ValueError, match="4 layers from a BERT of 3"):
        qformer_config(bert.config(), layers=4)


def test_a_missing_tensor_is_named(start, bert, tmp_path):
    config, fresh, _ = start
    other = Directory(tiny.bert(tmp_path / "two", layers=2))
    with pytest.raises(ValueError, match=r"no tensor 'encoder\.layer\.2\."):
        initialize_qformer(params.unflatten(fresh), other, config)


def test_the_oldest_files_name_norms_otherwise(bert, tmp_path):
    """Google's own bert-base-uncased has gamma and beta."""
    shutil.copytree(bert.path, tmp_path / "old")
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "old" / "model.safetensors")
    config = qformer_config(bert.config(), queries=5)
    fresh = fresh_qformer(config)
    trees = [initialize_qformer(fresh, Directory(path), config) for path in (bert.path, tmp_path / "old")]
    chex.assert_trees_all_equal(*trees)
