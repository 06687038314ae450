"""Compute the image tokens that a recipe trains on, once, for many runs.

    python -m blip2_jax.cache_features --config=configs/stage1.py:eva_g --config.data.features=DIR \\
        --config.data.feature_views=4 --config.data.feature_dtype=bfloat16

Afterwards the same --config.data settings make a run read them instead of running the encoder; DIR is for training
alone, and what does not fit (other weights, other views, another source) is an error there. Started again after an
interruption it goes on with the next file. Several processes, as in training, share the files of a folder that all see.
"""

from __future__ import annotations

import sys

import jax
import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from blip2_jax import configuration, tasks
from blip2_jax.data.mixture import parse_mixture
from blip2_jax.parallel import mesh as meshes
from blip2_jax.parallel import processes


def run(config: ml_collections.ConfigDict) -> None:
    """Compute what is missing.

    Raises:
      ValueError: the recipe asks for no image tokens.
      OSError: there is no room.
    """
    if not config.data.feature_views:
        raise ValueError("config.data.feature_views is 0: give the number of random views that each picture is to have")
    task = tasks.create(configuration.resolved(config))
    task.mesh = meshes.make_mesh("data=-1", jax.local_devices())
    named = [config.data.train, config.data.get("questions", "")]
    sources = dict.fromkeys(name for text in named if text for name, _ in parse_mixture(text))
    for name in sources:
        task.compute_features(name, training=True)
        plan, root = task.feature_plan(name, training=True), task.features_root(training=True)
        size = plan.views * plan.records * plan.record_bytes
        print(f"{name}: {plan.records:,} pictures, {plan.views} views, {size / 1e9:,.2f} GB in {plan.folder(root)}")


def main(_argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    try:
        processes.join(None)
        run(flags.FLAGS.config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "A recipe: a file of configs/, :VARIANT behind it.")
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=configuration.parse_flags)
