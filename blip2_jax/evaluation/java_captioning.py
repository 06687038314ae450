"""METEOR and SPICE, which only their authors' Java programs compute: through pycocoevalcap, where all that is there.

pip install 'blip2_jax[java]'    and a Java; SPICE needs Java 8 or 11, and models that are downloaded once
"""

from __future__ import annotations

import importlib.util
import pathlib
import shutil
import subprocess
from collections.abc import Sequence

from blip2_jax.evaluation import captioning

NAMES = ("meteor", "spice")
_MODELS = "stanford-corenlp-3.6.0-models.jar"


def _package() -> pathlib.Path | None:
    spec = importlib.util.find_spec("pycocoevalcap")
    return pathlib.Path(next(iter(spec.submodule_search_locations))) if spec else None


def absent() -> dict[str, str]:
    """Of the metrics that cannot be computed here, why not."""
    package = _package()
    if package is None:
        return dict.fromkeys(NAMES, "pycocoevalcap is not installed: pip install 'blip2_jax[java]'")
    if shutil.which("java") is None:
        return dict.fromkeys(NAMES, "there is no java on the PATH")
    if not (package / "spice" / "lib" / _MODELS).exists():
        command = "python -m pycocoevalcap.spice.get_stanford_models"
        return {"spice": f"{_MODELS} is not there: in {package / 'spice'} run {command}, which downloads it"}
    return {}


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict[str, float], dict[str, str]]:
    """METEOR 1.5 and SPICE, 0 to 1 each.

    Args:
      predictions: a caption for each picture.
      references: for each picture all that is right.

    Returns:
      What could be computed, "meteor" and "spice", and of what could not why not.

    Raises:
      ValueError: as `captioning.tokens`.
    """
    predicted, known = captioning.tokens(predictions, references)
    candidates = {index: [" ".join(caption)] for index, caption in enumerate(predicted)}
    right = {index: [" ".join(caption) for caption in captions] for index, captions in enumerate(known)}
    reasons, scores = absent(), {}
    for name, compute in zip(NAMES, (_meteor, _spice), strict=True):
        if name not in reasons:
            try:
                scores[name] = float(compute(right, candidates))
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                # What a Java that is too new or has too little memory leaves behind.
                reasons[name] = f"its program failed: {type(error).__name__}: {error}"
    return scores, reasons


def _meteor(right: dict, candidates: dict) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor().compute_score(right, candidates)[0]


def _spice(right: dict, candidates: dict) -> float:
    from pycocoevalcap.spice.spice import Spice

    return Spice().compute_score(right, candidates)[0]
