"""Both stages on tiny models: blip2_jax/tasks, and what looks at a task."""

from __future__ import annotations

import functools

import jax
import numpy as np

from blip2_jax import params, tasks
from blip2_jax.checkpoints import store
from blip2_jax.decoding import Draws, GenerationConfig
from blip2_jax.evaluation import attention
from blip2_jax.tasks.common import Task
from blip2_jax.tasks.stage1 import Stage1
from blip2_jax.tasks.stage1_batches import Stage1Batches
from blip2_jax.tasks.stage2 import Stage2
from blip2_jax.tasks.stage2_batches import Stage2Batches
from blip2_jax.tasks.writing import Prompts, Writing
from tests import tiny
from tests.shapes.evaluation import CAPTION, DIRECTIONS
from tests.shapes.losses import METRICS
from tests.shapes.promises import HERE, KEY, Late, bool_, float16, float32, int32, kinds, ran, traced, uint8, uint32

# The sizes of tests/tiny.py; U tokens are the prompt, "A drawing of", in its tokenizer.
B, S, P, W, Q, T, U, E, M = 7, 32, 5, 24, 2, 6, 12, 8, 20
PICTURES, VIEWS = 18, 3


@functools.cache
def task(folder, stage: str, **changes) -> Task:
    tiny.recipe(stage, folder)  # Makes the models.
    settings = {
        **{"vision": f"hf:{folder / 'vit'}", "image_size": S, "batch_size": B, "data.feature_views": VIEWS},
        **{"model.layers": 2, "model.unroll": 1},
    }
    return tasks.create(tiny.recipe(stage, folder, init="scratch", **(settings | changes)))


@functools.cache
def initialized(task: Task) -> params.Tree:
    return task.initialize(jax.random.key(0))


@functools.cache
def saved(folder) -> str:
    """A checkpoint of stage 1."""
    first, checkpoint = STAGE1.make(folder), folder / "shapes"
    store.save_alone(checkpoint, initialized(first), first.config.to_dict(), first.frozen_identity())
    return str(checkpoint)


STAGE1, STAGE2 = (Late(functools.partial(task, stage=stage)) for stage in ("stage1", "stage2"))
BATCHES1, BATCHES2 = (stage.then(lambda task: task.batches) for stage in (STAGE1, STAGE2))
FROM_PIXELS = Late(functools.partial(task, stage="stage1", **{"data.feature_views": 0}))
WRITING = STAGE2.then(lambda task: task.writing)
SPOKEN = WRITING, STAGE2.then(lambda task: task.language({})), float32[3, Q, M], ["a"] * 3
ADAPTED = Late(functools.partial(task, stage="stage2", **{"lora.rank": 3, "lora.language": "layers/up"}))
LEARNT = ADAPTED.then(initialized)
FIRST, SECOND = STAGE1.then(initialized), STAGE2.then(initialized)
SOURCE, CHECKPOINT = Late(lambda folder: f"jsonl:{folder / 'pictures' / 'pictures.jsonl'}"), Late(saved)
SHOWN = STAGE1.then(lambda task: task.pictures(task.config.data.eval, training=False))
RNG = Late(lambda _: jax.random.key(0))
DRAWN, DRAWS = (
    GenerationConfig(4, num_return_sequences=2, temperature=1.0),
    Late(lambda _: Draws(jax.random.key(0), np.arange(B))),
)


def leaves(*paths: str):
    """Some of a tree's, by path."""
    return lambda tree: {path: params.flatten(tree)[path] for path in paths}


def table(pictures) -> tuple[int, np.ndarray]:
    """The number of views, and the image tokens of one."""
    return pictures.features.views, pictures.features[0, 1]


def tables(parts) -> list:
    """Those of parts of a mixture."""
    return [table(part.pictures) for part in parts]


def prepare(example: dict, rng: np.random.Generator) -> dict:
    return example


IDENTITY = {"image_id": uint32[B, 2], "example_mask": bool_[B]}
PIXELS, TOKENS = {"image": uint8[B, S, S, 3]} | IDENTITY, {"image_embeds": float16[B, P, W]} | IDENTITY
CAPTIONS = {"text_id": uint32[B, 2], "text_ids": int32[B, T], "text_mask": bool_[B, T]}
IMAGE = {"image_embeds": float16[P, W], "image_id": uint32[2]}
EXAMPLE, PREPARED = (IMAGE | {"key": key, "caption": text} for key, text in (("1", "A red square."), (str, str)))
TEXTS = {
    **{"prompt_ids": int32[B, U], "prompt_mask": bool_[B, U]},
    **{"target_ids": int32[B, T], "target_mask": bool_[B, T]},
}
ENCODED = {"prompt_ids": [1], "target_ids": [3, 2]}
POSITIONS = np.zeros((P, W), np.float32)
VISION = {"positions": float32[P, W], "blocks/up/kernel": float32[2, W, 40]}
FROZEN = {f"vision/{path}": kind for path, kind in VISION.items()}
MODEL1 = {"temperature": float32[()], "vision_proj/kernel": float32[W, E], "qformer/query_tokens": float32[1, Q, W]}
MODEL2 = {"language_projection/kernel": float32[W, M], "qformer/query_tokens": float32[1, Q, W]}
UP, TOKENS_ALONE = {"layers/up/kernel": float32[2, M, 44]}, {"query_tokens": float32[1, Q, W]}
ADAPTERS = {"layers/up/lora_a": float32[2, M, 3], "layers/up/lora_b": float32[2, 3, 44]}
LANGUAGE_ADAPTERS = {f"lora/language/{path}": kind for path, kind in ADAPTERS.items()}
LANGUAGE = {"language/layers/up/kernel": float32[2, M, 44]}
RANKED = ("itc", "itm", "itm_alone", "itm_lavis")
RECALLED = {f"retrieval/{by}/{path}": float for by in RANKED for path in params.flatten(DIRECTIONS)}
CLASSES = ["a", "red", "blue"]
LOSSES = dict.fromkeys(("loss_itc", "loss_itm", "loss_itg"), float)
WRITTEN = {f"caption/{name}": float for name in (*CAPTION, "loss", "shuffled_image_loss_increase")}

BOTH_STAGES = [
    ran(Task.vision_parameters.func, STAGE1, then=leaves(*VISION), gives=VISION),
    ran(Task.put, STAGE1, "vision", then=lambda put: put("positions", POSITIONS), gives=float32[P, W]),
    ran(Task.shapes, STAGE1, then=leaves(*MODEL1), gives=MODEL1),
    ran(Task.frozen_shapes, STAGE1, then=leaves(*FROZEN), gives=FROZEN),
    ran(Task.frozen.fget, STAGE1, gives={}),
    ran(Task.frozen.fget, FROM_PIXELS, then=leaves(*FROZEN), gives=FROZEN),
    ran(Task.encode, STAGE1, uint8[B, S, S, 3], gives=float32[B, P, W]),
    ran(Task.schema, STAGE1, gives=TOKENS | CAPTIONS),
    ran(Task.schema, FROM_PIXELS, gives=PIXELS | CAPTIONS),
    ran(Task.schema, STAGE2, gives=TOKENS | TEXTS),
    ran(Task.pictures, STAGE1, SOURCE, True, then=table, gives=(int, float16[P, W])),
    ran(
        Task.evaluation_pictures,
        STAGE1,
        then=lambda found: [table(pictures) for pictures in found.values()],
        gives=[(int, float16[P, W])],
    ),
    ran(Task.mixture, STAGE1, SOURCE, prepare, then=tables, gives=[(int, float16[P, W])]),
    ran(Stage1.training_parts, STAGE1, then=tables, gives=[(int, float16[P, W])]),
    ran(Stage2.training_parts, STAGE2, then=tables, gives=[(int, float16[P, W])]),
    ran(Task.sentence_embeddings, STAGE1, ["a red square"] * B, gives=float32[B, W]),
    ran(Task.adaptable, STAGE1, "qformer", then=lambda base: leaves("query_tokens")(base.shapes), gives=TOKENS_ALONE),
    traced(Task.fresh, ADAPTED, KEY, then=leaves(*LANGUAGE_ADAPTERS), on=HERE, gives=LANGUAGE_ADAPTERS),
    ran(Task.assembled, ADAPTED, LEARNT, then=leaves(*LANGUAGE_ADAPTERS), gives=LANGUAGE_ADAPTERS),
    ran(Task.initialize, STAGE2, RNG, then=leaves(*MODEL2), gives=MODEL2),
]

FIRST_STAGE = [
    ran(Stage1Batches.schema, BATCHES1, B, gives=CAPTIONS),
    ran(Stage1Batches.prepare_caption, BATCHES1, EXAMPLE, None, gives=PREPARED | {"text": str}),
    ran(Stage1Batches.collate, BATCHES1, [EXAMPLE | {"text": "a red square"}] * B, gives=TOKENS | CAPTIONS),
    traced(Stage1.fresh_model, STAGE1, KEY, then=leaves(*MODEL1), on=HERE, gives=MODEL1),
    ran(Stage1.initialize, STAGE1, RNG, then=leaves(*MODEL1), gives=MODEL1),
    traced(
        Stage1.value_and_gradients,
        *(STAGE1, FIRST.then(kinds), {}, TOKENS | CAPTIONS, KEY),
        on=HERE,
        gives=((float32[()], METRICS), FIRST.then(kinds)),
    ),
    traced(
        Stage1.read_image,
        *(STAGE1, STAGE1.then(lambda task: task.model), float32[B, P, W]),
        on=HERE,
        gives=float32[B, Q, E],
    ),
    ran(
        Stage1.pair_scores,
        *(STAGE1, FIRST, float32[B, P, W], float32[B, Q, E], ["a red square"] * B),
        gives=(float32[B], float32[B, 2]),
    ),
    ran(Stage1.captions, STAGE1, FIRST, float32[B, P, W], DRAWN, DRAWS, gives=[[str] * 2] * B),
    ran(
        Stage1.class_features,
        *(STAGE1, FIRST, STAGE1.then(lambda task: task.evaluation_layout()), CLASSES, ["a {}", "{}"]),
        gives=float32[3, E],
    ),
    ran(Stage1.evaluate, STAGE1, FIRST, SHOWN, then=lambda found: found[0], gives=LOSSES | RECALLED),
]

SECOND_STAGE = [
    ran(Stage2Batches.schema, BATCHES2, B, gives=TEXTS),
    ran(Stage2Batches.prepare_caption, BATCHES2, EXAMPLE, then=leaves(*IMAGE), gives=IMAGE),
    ran(Stage2Batches.prepare_question, BATCHES2, EXAMPLE | {"category": "a"}, then=leaves(*IMAGE), gives=IMAGE),
    ran(
        Stage2Batches.collate, BATCHES2, [EXAMPLE | {"prompt_ids": [1], "target_ids": [3, 2]}] * B, gives=TOKENS | TEXTS
    ),
    traced(Stage2.fresh_model, STAGE2, KEY, then=leaves(*MODEL2), on=HERE, gives=MODEL2),
    ran(Stage2.adaptable, ADAPTED, "language", then=lambda base: leaves("layers/up/kernel")(base.shapes), gives=UP),
    ran(Stage2.language, ADAPTED, LEARNT, then=leaves(*UP, *ADAPTERS), gives=UP | ADAPTERS),
    ran(Stage2.frozen_shapes, STAGE2, then=leaves(*LANGUAGE), gives=LANGUAGE),
    ran(Stage2.frozen.fget, STAGE2, then=leaves(*LANGUAGE), gives=LANGUAGE),
    traced(
        Stage2.value_and_gradients,
        *(STAGE2, SECOND.then(kinds), STAGE2.then(lambda task: task.frozen), TOKENS | TEXTS, KEY),
        on=HERE,
        gives=((float32[()], {}), SECOND.then(kinds)),
    ),
    traced(
        Stage2.read_image,
        *(STAGE2, STAGE2.then(lambda task: task.model), float32[B, P, W]),
        on=HERE,
        gives=float32[B, Q, M],
    ),
    traced(Stage2.soft_prompt, STAGE2, SECOND.then(kinds), float32[B, P, W], on=HERE, gives=float32[B, Q, M]),
    ran(Stage2.read, STAGE2, SECOND, float32[3, P, W], ["a"] * 3, gives=float32[3, Q, M]),
    ran(Stage2.captions, STAGE2, SECOND, float32[B, P, W], DRAWN, DRAWS, gives=[[str] * 2] * B),
    ran(Stage2.language_parameters.func, STAGE2, then=leaves(*UP), gives=UP),
    ran(Writing.instructions, WRITING, ["a"], gives={}),
    ran(Writing.prompts, WRITING, ["a", "a red"], 3, gives=Prompts(int32[2, 16], bool_[2, 16])),
    ran(Writing.write, *SPOKEN, GenerationConfig(4), gives=[[str]] * 3),
    ran(Writing.log_probabilities, *SPOKEN, [["a", "red"]] * 3, gives=float32[3, 2]),
    ran(Stage2.evaluate, STAGE2, SECOND, SHOWN, then=lambda found: found[0], gives=WRITTEN),
]

STARTS = [
    ran(tasks.starting_point, STAGE2, then=lambda start: leaves(*MODEL2)(start(jax.random.key(0))), gives=MODEL2),
    ran(tasks.warm_start, STAGE2, RNG, SECOND, "test", then=leaves(*MODEL2), gives=MODEL2),
    ran(tasks.load_trained, CHECKPOINT, then=lambda found: leaves(*MODEL1)(found[1]), gives=MODEL1),
]

ATTENTION = [
    ran(attention.overlay, uint8[16, 16, 3], float32[2, 9], then=np.asarray, gives=uint8[16, 32, 3]),
    ran(attention.cross_attention, STAGE1, FIRST, float16[B, P, W], gives=float32[B, Q, P]),
    ran(
        attention.samples,
        *(STAGE1, FIRST, SHOWN, 3),
        gives=[{**dict.fromkeys(("kind", "stage", "key", "text"), str), "weights": [[int] * P] * Q}] * 3,
    ),
]

PROMISES = BOTH_STAGES + FIRST_STAGE + SECOND_STAGE + STARTS + ATTENTION
