"""The Q-Former that adapters are trained beside (config.lora.qformer): a frozen part, named by config.init.

It is not saved with the adapters. A checkpoint remembers where it came from and what it held, like every frozen part.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib

import numpy as np

from blip2_jax import params
from blip2_jax.checkpoints import downloads, mapping, store, trained
from blip2_jax.checkpoints.frozen import Frozen, override
from blip2_jax.models.qformer import QFormerConfig

_FOREIGN = ("lavis", "hf")


class QFormerBase(Frozen):
    """As `Frozen`; its source may also be a workdir or a checkpoint of ours."""

    @functools.cached_property
    def path(self) -> pathlib.Path:
        """Where it is.

        Raises:
          FileNotFoundError, ConnectionError, ValueError: it is not there, or no source is named.
        """
        if self.source in ("", "scratch"):
            raise ValueError(
                "config.lora.qformer adapts a Q-Former that has been trained: name one with --config.init=DIR (a "
                "workdir, a checkpoint, lavis:FILE or hf:DIR)"
            )
        if self.kind in _FOREIGN:
            return super().path
        return store.find_checkpoint(override(self.part) or self.source)

    @functools.cached_property
    def sha256(self) -> str:
        """Of its weights."""
        if self.kind in _FOREIGN:
            return super().sha256
        digest, folder = hashlib.sha256(), self.path / "trainable"
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(folder).as_posix()} {downloads.file_sha256(file)}\0".encode())
        return digest.hexdigest()

    def identity(self, dtype: object) -> dict[str, str]:
        """What a checkpoint remembers of it: it stays in float32, whatever other frozen parts are kept in."""
        return super().identity(np.float32)


def find(init: str) -> QFormerBase:
    """The Q-Former that adapters are trained beside; that of a checkpoint with such adapters is the one beside them."""
    if init in ("", "scratch") or init.startswith(tuple(f"{kind}:" for kind in _FOREIGN)):
        return QFormerBase("qformer", init)
    try:
        checkpoint = store.find_checkpoint(init)
    except FileNotFoundError:  # Raised again where it is needed.
        return QFormerBase("qformer", init)
    known = json.loads((checkpoint / "frozen.json").read_text())
    return QFormerBase("qformer", known["qformer"]["source"] if "qformer" in known else str(checkpoint))


def load(base: QFormerBase, template: params.Tree, config: QFormerConfig, put: mapping.Put) -> params.Tree:
    """Its parameters.

    Args:
      base: of `find`.
      template: the Q-Former's tree, as shapes.
      config: its sizes.
      put: where leaves go.

    Raises:
      ValueError: something is missing there, or has another shape.
    """
    if base.kind in _FOREIGN:
        opened = trained.open_source(f"{base.kind}:{base.path}")
        found = params.flatten(trained.read(opened, {"qformer": template}, config)[0]["qformer"])
    else:
        found = params.flatten(store.load_trainable(base.path).get("qformer", {}))
    leaves = {}
    for path, like in params.flatten(template).items():
        if path not in found or found[path].shape != like.shape:
            there = f"of shape {found[path].shape}" if path in found else "not there"
            raise ValueError(
                f"{base.path}: qformer/{path} is {there}, but the Q-Former that config.lora.qformer adapts needs it of "
                f"shape {like.shape}: give both runs the same config.model"
            )
        leaves[path] = put(path, np.asarray(found[path]))
    return params.unflatten(leaves)
