"""Several sources in one string, with their shares."""

from __future__ import annotations

from blip2_jax.data.sources.names import refuse_secrets


def parse_mixture(text: str) -> list[tuple[str, float]]:
    """ "SRC@0.7 + SRC@0.3" to [(source, share)]; shares are normalised, and equal when none is given."""
    refuse_secrets(text)  # Here already, where an error would tell the whole of it.
    parts = [part.strip() for part in text.split(" + ")]
    if not all(parts):
        raise ValueError(f"data mixture {text!r}: expected 'SOURCE@WEIGHT + SOURCE@WEIGHT'")
    names, weights = [], []
    for part in parts:
        name, separator, weight = part.rpartition("@")
        try:
            names.append(name if separator else part)
            weights.append(float(weight) if separator else 1.0)
        except ValueError as error:
            raise ValueError(f"data mixture {text!r}: {weight!r} is not a weight") from error
    if min(weights) <= 0:
        raise ValueError(f"data mixture {text!r}: weights must be above 0")
    return [(name, weight / sum(weights)) for name, weight in zip(names, weights, strict=True)]
