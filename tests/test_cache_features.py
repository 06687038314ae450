"""Image tokens computed by the command: runs train on them as on the encoder's, and on no others."""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from blip2_jax import cache_features, trainer
from blip2_jax.data import features
from blip2_jax.monitoring.metrics import read_metrics
from tests import tiny


def losses(config, workdir):
    trainer.train(config, workdir)
    return [row["loss"] for row in read_metrics(workdir / "metrics.jsonl")]


@pytest.fixture
def recipe(folder, tmp_path):
    """Pictures as they are, so that all views are one."""
    tiny.recipe("stage1", folder)  # Makes the models.
    plain = {"vision": f"hf:{folder / 'vit'}", "image_size": 32, "data.min_crop_scale": 1.0, "data.eval": ""}
    own = {"log_every": 1, "total_steps": 3, "checkpoint_every": 100, "model.layers": 2, "model.unroll": 1}
    return lambda **changes: tiny.recipe("stage1", folder, **(plain | own | changes))


def test_tokens_train_as_the_encoder_does(recipe, own_cache, tmp_path, monkeypatch):
    live = losses(recipe(**{"data.feature_views": 0}), tmp_path / "live")
    cached = {"data.feature_views": 1, "data.features": str(tmp_path / "tokens")}
    found = {}
    for dtype in ("float32", "bfloat16"):
        config = recipe(**cached, **{"data.feature_dtype": dtype})
        cache_features.run(config)
        with monkeypatch.context() as patch:
            patch.setattr(features, "compute", lambda *_, **__: pytest.fail("computed in the run"))
            found[dtype] = losses(config, tmp_path / dtype)
    np.testing.assert_allclose(found["float32"], live, rtol=1e-5)
    np.testing.assert_allclose(found["bfloat16"], live, rtol=1e-2)
    assert found["bfloat16"] != found["float32"]


def other_encoder(folder, copy):
    """The same with slightly other weights."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, copy / "model.safetensors")
    return f"hf:{copy}"


def test_tokens_of_other_settings_are_an_error(recipe, folder, own_cache, tmp_path):
    cached = {"data.feature_views": 1, "data.features": str(tmp_path / "tokens")}
    with pytest.raises(FileNotFoundError, match="holds no image tokens of this source: run cache_features"):
        trainer.Run(recipe(**cached), tmp_path / "none")
    cache_features.run(recipe(**cached))
    with pytest.raises(FileNotFoundError, match="dtype: 'float16' there, 'float32' in this run"):
        trainer.Run(recipe(**cached, **{"data.feature_dtype": "float32"}), tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"encoder: '[0-9a-f]{64}' there, '[0-9a-f]{64}' in this run"):
        trainer.Run(recipe(**cached, vision=other_encoder(folder / "vit", tmp_path / "vit")), tmp_path / "encoder")
    with pytest.raises(ValueError, match="feature_views is 0: give the number of random views"):
        cache_features.run(recipe(**{"data.feature_views": 0}))
