"""Losses, gradients and training steps of LAVIS's stage 1, by the code that trains, from the recorded negatives."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from blip2_jax import optimizer, params
from blip2_jax.checkpoints import mapping
from blip2_jax.compat import LAVIS
from blip2_jax.models.vision.vit import ViT
from blip2_jax.objectives.matching import HardNegatives
from blip2_jax.parallel import mesh as meshes
from blip2_jax.parallel import sharding
from blip2_jax.step import initial_state, make_step
from blip2_jax.tasks.stage1_loss import Stage1Loss
from tests.parity import golden, ranks
from tests.parity.golden import Built, Case

# Quantity -> (ours, recorded), or ours alone where the recorded one has its name.
Quantities = dict[str, np.ndarray | tuple[np.ndarray, np.ndarray]]

# LAVIS's names of the losses, and the terms that make them.
_TERMS = {"total": ("itc", "itm", "itg"), "itc": ("itc",), "itm": ("itm",), "lm": ("itg",)}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A recorded case as our loss takes it.

    Attributes:
      loss: with LAVIS's switches for this case.
      parts: where parameters come from: "trainable" and "vision".
      unfrozen: the encoder is trained too.
      batch: of all ranks, one behind the other; with "negative_image" and "negative_text".
      ranks: how many processes recorded it.
    """

    loss: Stage1Loss
    parts: dict[str, Built]
    unfrozen: bool
    batch: dict[str, np.ndarray]
    ranks: int

    @property
    def trees(self) -> dict[str, Any]:
        """{"trainable", "frozen"} of the parameters."""
        trained, vision = self.parts["trainable"].parameters, {"vision": self.parts["vision"].parameters}
        if self.unfrozen:
            return {"trainable": trained | vision, "frozen": {}}
        return {"trainable": trained, "frozen": vision}

    def inputs(self, trees, batch) -> tuple:
        """The arguments of the loss, with the recorded negatives."""
        batch = dict(batch)
        chosen = batch.pop("negative_image"), batch.pop("negative_text")
        negatives = HardNegatives(*chosen, jnp.ones(len(chosen[0]), bool))
        return trees["trainable"], trees["frozen"], batch, jax.random.key(0), negatives


def by_rank(arrays: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The arrays of each rank by their own names; one rank where they have no prefix."""
    numbers = sorted({int(match[1]) for name in arrays if (match := re.match(r"rank(\d+)/", name))})
    pick = lambda prefix: {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    return [pick(f"rank{number}/") for number in numbers] or [dict(arrays)]


def read(case: Case) -> Recorded:
    """The loss, the parameters and the batch of a case."""
    parts = by_rank(case.inputs)
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if "images" in whole:  # Of every training step; here the first.
        whole |= {"image": whole["images"][0]} | {name: whole[name][0] for name in ("neg_image_idx", "neg_text_idx")}
    encoder, _, tower = golden.vit(case, prefix="visual_encoder.")
    built = golden.stage1(case)[1]
    rows = np.arange(len(whole["image"]), dtype=np.uint32)
    identity = lambda values: np.stack([values.astype(np.uint32), np.zeros_like(rows)], -1)
    batch = {
        "image": whole["image"].transpose(0, 2, 3, 1),
        "text_ids": whole["input_ids"],
        "text_mask": whole["attention_mask"].astype(bool),
        "image_id": identity(whole.get("image_id", rows)),
        "text_id": identity(rows),
        "example_mask": np.ones(len(rows), bool),
        "negative_image": whole["neg_image_idx"].astype(np.int32),
        "negative_text": whole["neg_text_idx"].astype(np.int32),
    }
    own = LAVIS if "through_gather" not in case.name else dataclasses.replace(LAVIS, gather_gradient=True)
    switches = dataclasses.replace(own, positives="image" if "image_id" in whole else "pair", world_size=len(parts))
    loss = Stage1Loss(
        built.module,
        lambda parameters, image: ViT(encoder).apply({"params": parameters}, image),
        int(whole["decoder_input_ids"][0, 0])
        if "decoder_input_ids" in whole
        else case.architecture["qformer"]["dec_id"],
        label_smoothing=case.architecture["stage1"]["label_smoothing"],
        switches=switches,
    )
    unfrozen = "unfrozen" in case.name
    return Recorded(loss, {"trainable": built, "vision": tower}, unfrozen, batch, len(parts))


def losses(case: Case, mesh: Mesh | None) -> Quantities:
    """Every recorded loss of the batch: its own, the mean of the ranks', and that of one process with all of it."""
    recorded = read(case)
    find = lambda loss: golden.run(
        lambda trees, batch: loss.loss(*recorded.inputs(trees, batch)), recorded.trees, recorded.batch, mesh
    )
    outputs = by_rank(case.outputs)
    names = {"loss_itc": "loss_itc", "loss_itm": "loss_itm", "loss_lm": "loss_itg"}
    total, metrics = find(recorded.loss)
    ours = {"loss": total} | {name: metrics[own] for name, own in names.items()}
    found: Quantities = {name: (value, np.mean([output[name] for output in outputs])) for name, value in ours.items()}
    if "global/loss" in case.outputs:
        switches = dataclasses.replace(recorded.loss.switches, rank_token_mean=False)
        total, metrics = find(dataclasses.replace(recorded.loss, switches=switches))
        found |= {"global/loss": total} | {f"global/{name}": metrics[own] for name, own in names.items()}
    return found


def gradients(case: Case, mesh: Mesh | None) -> Quantities:
    """Every recorded gradient by its LAVIS name, in one piece and, where the batch divides, in two.

    Cases that share another's weights are compared in one piece alone, as is a rank's gradient before
    DistributedDataParallel averages it. Keys' biases, whose gradients are zero but for noise, are left out.
    """
    recorded = read(case)
    rows = len(recorded.batch["image"])
    shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in golden.row_axes(mesh, rows))
    twice = (rows // shards) % 2 == 0 and (case.path / "model.safetensors").exists()
    of_rank = {f"rank{rank}/total": rank for rank in range(recorded.ranks)}
    groups = sorted({name.rpartition("/")[0] for name in case.gradients} - of_rank.keys())
    found: Quantities = {}
    for pieces in (1, 2) if twice else (1,):
        compute = _gradient_of_terms(recorded, pieces)
        for group in groups:
            terms = _TERMS[group.rpartition("/")[2]]
            weights = {name: np.float32(name in terms) for name in _TERMS["total"]}
            ours = golden.run(compute, recorded.trees | {"weights": weights}, recorded.batch, mesh)
            label = group if pieces == 1 else f"{group} in {pieces} pieces"
            found |= {f"{label}/{name}": pair for name, pair in _beside_recorded(case, recorded, ours, group)}
    before_averaging = _gradient_of_rank(recorded)
    for group, rank in of_rank.items():
        if any(name.startswith(f"{group}/") for name in case.gradients):
            ours = golden.run(
                before_averaging, recorded.trees | {"weights": {"rank": np.int32(rank)}}, recorded.batch, mesh
            )
            found |= {f"{group}/{name}": pair for name, pair in _beside_recorded(case, recorded, ours, group)}
    return found


def _gradient_of_terms(recorded: Recorded, pieces: int):
    """A function of trees (with the weights of the terms among them) and batch; one program for every group."""

    def compute(trees, batch):
        loss = dataclasses.replace(recorded.loss, pieces=pieces, **trees["weights"])
        return loss.value_and_gradients(*recorded.inputs(trees, batch))[1]

    return compute


def _gradient_of_rank(recorded: Recorded):
    """A function of trees (with the rank among the weights) and batch."""

    def compute(trees, batch):
        return ranks.gradient(recorded.loss, recorded.inputs(trees, batch), trees["weights"]["rank"], recorded.ranks)

    return compute


def _beside_recorded(case: Case, recorded: Recorded, ours, group: str):
    """(name, (our gradient, the recorded one)) of every parameter of a group."""
    heads = {name: tree for name, tree in ours.items() if name != "vision"}
    named = dict(mapping.export(heads, recorded.parts["trainable"].mapped))
    if recorded.unfrozen:
        named |= mapping.export(ours["vision"], recorded.parts["vision"].mapped)
    for path, theirs in case.gradients.items():
        name = path.removeprefix(f"{group}/")
        if name != path and not name.endswith(".key.bias"):
            yield name, (named[name], theirs)


# Training steps.


class _Task:
    """What `make_step` asks of a task; the negatives come with the batch."""

    def __init__(self, recorded: Recorded):
        self._recorded = recorded

    def value_and_gradients(self, trainable, frozen, batch, key):
        trees = {"trainable": trainable, "frozen": frozen}
        return self._recorded.loss.value_and_gradients(*self._recorded.inputs(trees, batch))


def training(case: Case, mesh: Mesh | None) -> Quantities:
    """The recorded steps of AdamW: each step's losses, and how far every parameter is from theirs at the end.

    What is compared of a parameter is the relative norm of the difference; keys' biases, whose gradient is noise that
    Adam makes a step of, are left out.
    """
    recorded = read(case)
    mesh = mesh or meshes.make_mesh("data=1", jax.devices()[:1])
    state, step, frozen = _start(case, recorded, mesh)
    names = {"loss": "loss", "loss_itc": "loss_itc", "loss_itm": "loss_itm", "loss_lm": "loss_itg"}
    ours = {name: [] for name in names}
    for number in range(len(case.inputs["images"])):
        batch = recorded.batch | {
            "image": case.inputs["images"][number].transpose(0, 2, 3, 1),
            "negative_image": case.inputs["neg_image_idx"][number].astype(np.int32),
            "negative_text": case.inputs["neg_text_idx"][number].astype(np.int32),
        }
        with jax.set_mesh(mesh):
            state, metrics = step(state, frozen, golden.place_batch(batch, mesh))
        for name, own in names.items():
            ours[name].append(np.asarray(metrics[own]))
    assert not np.asarray(state.skipped).any()
    found: Quantities = {name: np.stack(values) for name, values in ours.items()}
    final = jax.jit(lambda tree: tree, out_shardings=meshes.replicated(mesh))(state.trainable)
    for name, array in mapping.export(jax.tree.map(np.asarray, final), recorded.parts["trainable"].mapped):
        if not name.endswith(".key.bias"):
            theirs = case.final[name]
            error = np.linalg.norm(array - theirs) / np.linalg.norm(theirs)
            found[f"final/{name}"] = (error, np.zeros_like(error))
    return found


def _start(case: Case, recorded: Recorded, mesh: Mesh):
    """State, compiled step and frozen parameters before the first step, with LAVIS's groups and the recorded rates."""
    trainable, rates = recorded.trees["trainable"], case.inputs["lr"]
    decays = params.resolve(optimizer.decay_table(all_matrices=True), trainable, "weight decay")
    alike = params.resolve([(".*", 1.0)], trainable, "rate")
    # The recorded steps leave some of an epoch out, so they have the rates of no schedule: a flat one, and the rest.
    flat = optimizer.create(_settings(case), len(rates), decays, alike, by_epoch=True)
    transformation = optax.chain(flat, optax.scale_by_schedule(lambda count: jnp.asarray(rates / rates.max())[count]))
    state, places = initial_state(trainable, transformation, jax.random.key(0), mesh)
    frozen = {
        name: jax.tree.map(sharding.put, tree, sharding.shardings(tree, mesh))
        for name, tree in recorded.trees["frozen"].items()
    }
    return state, make_step(_Task(recorded), transformation, places), frozen


def _settings(case: Case) -> ml_collections.ConfigDict:
    """Our optimizer's settings from the words of meta.json, at the largest recorded rate without a schedule."""
    number = r"(\d+(?:\.\d*)?(?:e-?\d+)?)"
    words, rate = case.meta["optimizer"], float(case.inputs["lr"].max())
    beta1, beta2, epsilon = map(float, re.search(rf"betas=\({number}, *{number}\), *eps={number}", words).groups())
    config = ml_collections.ConfigDict()
    config.update(
        beta1=beta1, beta2=beta2, epsilon=epsilon, weight_decay=float(re.search(rf"decay {number}", words)[1])
    )
    config.update(learning_rate=rate, warmup=0, warmup_rate=rate, final_share=1.0, clip_norm=0.0)
    config.update(steps_per_epoch=len(case.inputs["lr"]))
    return config
