"""A batch of arrays to a loss and its gradient: what of blip2_jax/tasks knows no files."""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax

from blip2_jax.models.blip2 import ImageTextModel, SoftPromptModel
from blip2_jax.models.language.opt import OPT
from blip2_jax.models.language.t5 import T5
from blip2_jax.tasks.encoding import image_embeds
from blip2_jax.tasks.stage1_loss import Stage1Loss
from blip2_jax.tasks.stage2_loss import Stage2Loss, Texts
from tests.shapes import language
from tests.shapes.lengths import B, M, P, Q, S, T, U, V, W
from tests.shapes.models import BLIP2, KERNELS, QFORMER, SMALL
from tests.shapes.promises import HERE, KEY, MESH, Late, bfloat16, bool_, float16, float32, int32, traced, uint8, uint32

LOSS = float32[()]
# Of a picture SMALL makes more tokens than P.
PLAIN = dataclasses.replace(BLIP2, image_positions=False, qformer=dataclasses.replace(QFORMER, layers=2))
PIXELS, TOKENS = {"image": uint8[B, S, S, 3]}, {"image_embeds": float16[B, P, W]}

ENCODING = [
    traced(image_embeds, SMALL.encode, {}, {"vision": KERNELS}, PIXELS, gives=bfloat16[B, 25, W]),
    traced(image_embeds, SMALL.encode, {"vision": KERNELS}, {}, PIXELS, gives=bfloat16[B, 25, W]),
    traced(image_embeds, SMALL.encode, {}, {}, TOKENS, gives=float16[B, P, W]),
]


@functools.cache
def trainable(model, *inputs) -> dict:
    """The parameters of a stage's model, without values."""

    def every_pass(model: ImageTextModel, embeds, ids, mask):
        image = model.project_image(embeds)
        model.text_features(ids, mask)
        model.match(image, ids, mask)
        model.caption_features(model.image_features(image).cache, ids, mask)

    method = every_pass if isinstance(model, ImageTextModel) else None
    return jax.eval_shape(functools.partial(model.init, method=method), KEY, *inputs)["params"]


STAGE1 = Stage1Loss(ImageTextModel(PLAIN), SMALL.encode, V - 1, diversity=0.5)
IN_PIECES = dataclasses.replace(STAGE1, pieces=2, itm_every=3)
FIRST = Late(lambda _: trainable(STAGE1.model, float32[B, P, W], int32[B, T], bool_[B, T]))
WITH_ENCODER = FIRST.then(lambda trainable: trainable | {"vision": KERNELS})
PAIRS = {
    **{"text_ids": int32[B, T], "text_mask": bool_[B, T]},
    **{"image_id": uint32[B, 2], "text_id": uint32[B, 2], "example_mask": bool_[B]},
}
TERMS = ("loss_itc", "loss_itm", "loss_itg", "itm_accuracy_positive", "itm_accuracy_negative")
METRICS = dict.fromkeys((*TERMS, "temperature", "query_cosine"), LOSS) | {"itm_rows_without_negative": int32[()]}

FIRST_STAGE = [
    traced(Stage1Loss.loss, STAGE1, FIRST, {}, PAIRS | TOKENS, KEY, gives=(LOSS, METRICS)),
    *[
        traced(
            Stage1Loss.value_and_gradients,
            *(loss, WITH_ENCODER, {}, PAIRS | PIXELS, KEY),
            gives=((LOSS, METRICS), WITH_ENCODER),
            on=on,
        )
        for loss, on in ((STAGE1, HERE), (IN_PIECES, (MESH,)))
    ],
]

DECODER = OPT(language.OPT)
STAGE2 = Stage2Loss(SoftPromptModel(PLAIN, M), DECODER, SMALL.encode, begin=(3,))
APART = dataclasses.replace(STAGE2, language_model=T5(language.FLAN), pieces=2)
SECOND = Late(lambda _: trainable(STAGE2.model, float32[B, P, W], int32[B, T], bool_[B, T]))
READS = {"instruction_ids": int32[B, T], "instruction_mask": bool_[B, T]}
WRITES = {
    **{"prompt_ids": int32[B, T], "prompt_mask": bool_[B, T], "target_ids": int32[B, U], "target_mask": bool_[B, U]},
    **{"example_mask": bool_[B]},
}
BATCH, PROMPT = TOKENS | READS | WRITES, bfloat16[B, Q, M]


def frozen(loss: Stage2Loss) -> Late:
    return Late(lambda _: {"language": language.parameters(loss.language_model)})


def texts(read: int, written: int) -> Texts:
    return Texts(int32[B, read], bool_[B, read], int32[B, written], bool_[B, written])


ROW = T + U
SECOND_STAGE = [
    traced(Stage2Loss.texts, STAGE2, WRITES, gives=texts(ROW, ROW)),
    traced(Stage2Loss.texts, dataclasses.replace(STAGE2, row_length=S), WRITES, gives=texts(S, S)),
    traced(Stage2Loss.texts, APART, WRITES, gives=texts(T, U)),
    traced(Stage2Loss.soft_prompt, STAGE2, SECOND, float32[B, P, W], READS, uint32[B], KEY, gives=PROMPT),
    traced(Stage2Loss.prefix, STAGE2, DECODER, float32[B, Q, M], gives=bfloat16[B, 1 + Q, M]),
    *[
        traced(
            Stage2Loss.language_loss,
            *(loss, frozen(loss).then(operator.itemgetter("language")), PROMPT, texts(read, written)),
            *(float32[B, written], uint32[B], KEY),
            gives=LOSS,
        )
        for loss, read, written in ((STAGE2, ROW, ROW), (APART, T, U))
    ],
    traced(Stage2Loss.loss, STAGE2, SECOND, frozen(STAGE2), BATCH, KEY, gives=LOSS),
    *[
        traced(
            Stage2Loss.value_and_gradients,
            *(loss, SECOND, frozen(loss), BATCH, KEY),
            gives=(LOSS, SECOND),
        )
        for loss in (STAGE2, APART)
    ],
]

PROMISES = ENCODING + FIRST_STAGE + SECOND_STAGE
