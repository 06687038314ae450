"""What LAVIS (commit 506965b) does otherwise than this code, each difference a switch of the block `config.compat`.

The defaults are what is right. `--config.compat.preset=lavis` sets every switch to what the original did; with the
original's optimizer settings (`optimizer.beta2=0.999`) that reproduces its training.
"""

from __future__ import annotations

import dataclasses

import ml_collections

POSITIVES = ("image_or_text", "image", "pair")
NEGATIVES = ("hard", "before_2023_07")


@dataclasses.dataclass(frozen=True)
class Compat:
    """The switches, by their names in `config.compat`.

    Attributes:
      gather_gradient: ITC's candidates carry gradient; in the original only anchors do.
      positives: which pairs of a batch are never negatives and share ITC's target: "image_or_text" (the same image or
        the same caption), "image" (the original where it fine-tunes for retrieval), "pair" (a row and itself).
      negatives: how hard negatives are drawn: "hard", or "before_2023_07" (softmax over the positives too, plus 1e-4).
      rank_token_mean: language-model losses are the mean over ranks of each rank's mean over its tokens, and not the
        mean over all tokens.
      world_size: of the run whose ranks are imitated; 0: as many as the batch has shards.
      bos_target: without a prompt, the token between soft prompt and text is to be predicted.
      llm_dropout: the frozen language model's own dropout stays on.
      decay_all_matrices: weight decay pulls everything that is not of one dimension, the temperature among it.
      epoch_schedule: the cosine goes by epochs, and warm-up ends with the first; needs optimizer.steps_per_epoch.
    """

    gather_gradient: bool = True
    positives: str = "image_or_text"
    negatives: str = "hard"
    rank_token_mean: bool = False
    world_size: int = 0
    bos_target: bool = False
    llm_dropout: bool = False
    decay_all_matrices: bool = False
    epoch_schedule: bool = False


LAVIS = Compat(
    gather_gradient=False,
    positives="pair",
    rank_token_mean=True,
    bos_target=True,
    llm_dropout=True,
    decay_all_matrices=True,
    epoch_schedule=True,
)


def block() -> ml_collections.ConfigDict:
    """The block of a recipe: nothing imitated."""
    return ml_collections.ConfigDict({"preset": "", **dataclasses.asdict(Compat())})


def resolve(config: ml_collections.ConfigDict) -> Compat:
    """The switches that a block says: those of its preset, or each by itself.

    Raises:
      ValueError: an unknown preset or choice, or switches beside a preset that contradict it.
    """
    switches = {field.name: config[field.name] for field in dataclasses.fields(Compat)}
    found = Compat(**switches)
    for name, choices in (("positives", POSITIVES), ("negatives", NEGATIVES)):
        if switches[name] not in choices:
            raise ValueError(f"compat.{name} = {switches[name]!r}: expected one of {', '.join(choices)}")
    if found.world_size < 0:
        raise ValueError(f"compat.world_size = {found.world_size}: expected 0 or the number of ranks to imitate")
    if config.preset not in ("", "lavis"):
        raise ValueError(f"compat.preset = {config.preset!r}: expected '' or 'lavis'")
    if not config.preset:
        return found
    if dataclasses.replace(found, world_size=0) != Compat():
        raise ValueError("compat.preset = 'lavis' sets every switch: give no other beside it but compat.world_size")
    return dataclasses.replace(LAVIS, world_size=found.world_size)
