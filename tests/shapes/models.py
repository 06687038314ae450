"""Flax modules around images and the Q-Former: blip2_jax/models without its language models.

They compute in bfloat16 here, so that what is promised to be float32 shows.
"""

from __future__ import annotations

import jax.numpy as jnp

from blip2_jax.models import blip2, layers, lora, qformer
from blip2_jax.models.blip2 import Blip2Config, ImageTextModel, SoftPromptModel
from blip2_jax.models.layers import KeyValue
from blip2_jax.models.qformer import AttentionPattern, QFormer, QFormerCache, QFormerConfig
from blip2_jax.models.vision import VisionEncoder, efficientnet_lite, vit
from blip2_jax.models.vision.efficientnet_lite import EfficientNetLite, Stage
from blip2_jax.models.vision.vit import ViTConfig
from tests.shapes.lengths import B, C, D, E, F, H, K, L, M, N, P, Q, S, T, U, V, W, b, d
from tests.shapes.promises import KEY, bfloat16, bool_, float32, float64, int32, ran, traced, uint8, uint32

# Every other layer reads the image: C - 1 groups of two and a last layer alone.
QFORMER = QFormerConfig(
    width=D, layers=2 * C - 1, heads=H, mlp_width=F, vocab_size=V, max_positions=T, queries=Q, dtype=jnp.bfloat16
)
BLIP2 = Blip2Config(QFORMER, image_tokens=P, image_positions=True, embed_width=E)
NUMBERS = uint32[B]
TEXT = int32[B, T], bool_[B, T]


def keys(*shape: int) -> KeyValue:
    """With values of the same shape."""
    return KeyValue(bfloat16[shape], bfloat16[shape])


IMAGE, ONE_IMAGE = keys(C, B, P, H, d), keys(B, P, H, d)
CACHE = QFormerCache((keys(C - 1, B, Q, H, d),) * 2, (keys(B, Q, H, d),))
QUERIES, WORDS = bfloat16[B, Q, D], bfloat16[B, T, D]
BOTH, SEEN = (QUERIES, WORDS), bool_[B, 1, Q + T, Q + T]
OF_BOTH, DECODED = keys(B, Q + T, H, d), (WORDS, float32[V, D], float32[V])
ROOMY = QFormerCache((keys(C - 1, B, Q + T, H, d),) * 2, (keys(B, Q + T, H, d),))
NEXT, AHEAD = (WORDS, ROOMY), bool_[B, 1, T, Q + T]

LAYERS = [
    traced(layers.Dense.__call__, layers.Dense(E, dtype=jnp.bfloat16), float32[B, T, D], gives=bfloat16[B, T, E]),
    traced(
        layers.DenseGeneral.__call__,
        *(layers.DenseGeneral(D, axis=(-2, -1), dtype=jnp.bfloat16), float32[B, T, H, d]),
        gives=WORDS,
    ),
    traced(layers.RMSNorm.__call__, layers.RMSNorm(1e-6, jnp.bfloat16), float32[B, T, D], gives=WORDS),
    traced(layers.dropout_mask, KEY, NUMBERS, 0.5, (T, D), gives=bool_[B, T, D]),
    traced(layers.Dropout.__call__, layers.Dropout(0.5), WORDS, NUMBERS, gives=WORDS),
    traced(
        layers.attention_weights,
        *(bfloat16[B, T, N, d], bfloat16[B, S, K, d], bool_[B, 1, T, S], float32[B, N, T, S]),
        gives=float32[B, N, T, S],
    ),
    traced(
        layers.dot_product_attention,
        *(bfloat16[B, T, N, d], *keys(B, S, K, d), bool_[1, 1, T, S]),
        bias=float32[1, N, T, S],
        **{"dropout_rate": 0.5, "dropout_key": KEY, "dropout_rows": NUMBERS},
        gives=bfloat16[B, T, N, d],
    ),
    traced(layers.causal_mask, T, U, gives=bool_[1, 1, T, U + T]),
]

QFORMERS = [
    traced(qformer.attention_mask, AttentionPattern.CAUSAL, Q, bool_[B, T], gives=SEEN),
    traced(
        qformer.SelfAttention.__call__,
        *(qformer.SelfAttention(QFORMER), WORDS, bool_[B, 1, T, Q + T], keys(B, Q, H, d), NUMBERS),
        gives=(WORDS, keys(B, T, H, d)),
    ),
    # Several rows of queries to an image.
    traced(
        qformer.CrossAttention.__call__,
        *(qformer.CrossAttention(QFORMER), QUERIES, keys(B // 2, P, H, d), NUMBERS),
        gives=QUERIES,
    ),
    traced(qformer.FeedForward.__call__, qformer.FeedForward(QFORMER), WORDS, NUMBERS, gives=WORDS),
    traced(
        qformer.Layer.__call__,
        *(qformer.Layer(QFORMER, True), BOTH, SEEN, ONE_IMAGE, None, NUMBERS),
        gives=(BOTH, OF_BOTH),
    ),
    traced(
        qformer.LayerGroup.__call__,
        *(qformer.LayerGroup(QFORMER, 2), BOTH, SEEN, ONE_IMAGE, None, NUMBERS),
        gives=(BOTH, (OF_BOTH, OF_BOTH)),
    ),
    traced(
        qformer.Transformer.__call__,
        *(qformer.Transformer(QFORMER), (QUERIES, None), None, IMAGE, None, NUMBERS),
        gives=((QUERIES, None), CACHE),
    ),
    traced(qformer.ImageProjection.__call__, qformer.ImageProjection(QFORMER), bfloat16[B, P, W], gives=IMAGE),
    traced(qformer.LanguageHead.__call__, qformer.LanguageHead(QFORMER), WORDS, gives=(WORDS, float32[V])),
    traced(QFormer.project_image, QFormer(QFORMER), bfloat16[B, P, W], gives=IMAGE),
    traced(QFormer.encode_queries, QFormer(QFORMER), IMAGE, dropout_rows=NUMBERS, gives=(QUERIES, CACHE)),
    traced(QFormer.encode_text, QFormer(QFORMER), *TEXT, dropout_rows=NUMBERS, gives=WORDS),
    traced(QFormer.encode_pair, QFormer(QFORMER), IMAGE, *TEXT, dropout_rows=NUMBERS, gives=BOTH),
    traced(QFormer.encode_pair, QFormer(QFORMER), keys(C, B // 2, P, H, d), *TEXT, dropout_rows=NUMBERS, gives=BOTH),
    traced(QFormer.decode_text, QFormer(QFORMER), CACHE, *TEXT, dropout_rows=NUMBERS, gives=DECODED),
    ran(QFormerCache.shape.fget, CACHE, gives=(int, int)),
    traced(QFormerCache.with_room, CACHE, T, gives=ROOMY),
    traced(QFormerCache.write, ROOMY, CACHE, int32[()], gives=ROOMY),
    traced(QFormer.decode_tokens, QFormer(QFORMER), ROOMY, int32[B, T], int32[T], AHEAD, int32[()], gives=NEXT),
]

STAGES = [
    traced(blip2.ImageTokens.__call__, blip2.ImageTokens(BLIP2), float32[B, P, W], gives=bfloat16[B, P, W]),
    traced(ImageTextModel.project_image, ImageTextModel(BLIP2), float32[B, P, W], gives=IMAGE),
    traced(
        ImageTextModel.image_features,
        *(ImageTextModel(BLIP2), IMAGE),
        dropout_rows=NUMBERS,
        gives=blip2.ImageFeatures(float32[B, Q, E], QUERIES, CACHE),
    ),
    traced(ImageTextModel.text_features, ImageTextModel(BLIP2), *TEXT, dropout_rows=NUMBERS, gives=float32[B, E]),
    traced(ImageTextModel.match, ImageTextModel(BLIP2), IMAGE, *TEXT, dropout_rows=NUMBERS, gives=float32[B, 2]),
    traced(ImageTextModel.caption_features, ImageTextModel(BLIP2), CACHE, *TEXT, dropout_rows=NUMBERS, gives=DECODED),
    traced(
        ImageTextModel.next_features,
        *(ImageTextModel(BLIP2), ROOMY, int32[B, T], int32[T], AHEAD, int32[()]),
        gives=NEXT,
    ),
    traced(SoftPromptModel.__call__, SoftPromptModel(BLIP2, M), float32[B, P, W], gives=bfloat16[B, Q, M]),
    traced(
        SoftPromptModel.__call__,
        *(SoftPromptModel(BLIP2, M), float32[B, P, W], *TEXT),
        dropout_rows=NUMBERS,
        gives=bfloat16[B, Q, M],
    ),
]

# A stem and a block, each of stride 2.
SMALL = VisionEncoder(EfficientNetLite((Stage(1, 3, 2, 1, W),), F, jnp.bfloat16), W, S, (127.0,) * 3, (50.0,) * 3)
KERNELS = {
    "stem": {"kernel": float32[3, 3, 3, F], "bias": float32[F]},
    "block_0": {
        "depthwise": {"kernel": float32[3, 3, F], "bias": float32[F]},
        "project": {"kernel": float32[1, 1, F, W], "bias": float32[W]},
    },
}
# Three whole patches a side, and the class token.
VIT = ViTConfig(
    image_size=S, patch=b, width=D, layers=L, heads=H, mlp_width=F, pre_norm=True, final_norm=True, dtype=jnp.bfloat16
)

ENCODERS = [
    traced(VisionEncoder.init, SMALL, KEY, gives=KERNELS),
    traced(VisionEncoder.encode, SMALL, KERNELS, uint8[B, S, S, 3], gives=bfloat16[B, 25, W]),
    traced(
        efficientnet_lite.depthwise_convolution, float32[B, S, T, W], float32[3, 3, W], 2, gives=float32[B, T, 5, W]
    ),
    traced(
        efficientnet_lite.Convolution.__call__,
        *(efficientnet_lite.Convolution(F, 3, 2, dtype=jnp.bfloat16), float32[B, S, T, W]),
        gives=bfloat16[B, T, 5, F],
    ),
    traced(
        efficientnet_lite.InvertedResidual.__call__,
        *(efficientnet_lite.InvertedResidual(F, 5, 2, 6, jnp.bfloat16), float32[B, S, T, W]),
        gives=bfloat16[B, T, 5, F],
    ),
    # As released: 65 pixels are three cells a side, the last of them begun.
    traced(EfficientNetLite.__call__, EfficientNetLite(), float32[B, 65, 65, 3], gives=float32[B, 9, 320]),
    traced(vit.Block.__call__, vit.Block(VIT), bfloat16[B, P, D], gives=(bfloat16[B, P, D], None)),
    traced(vit.ViT.__call__, vit.ViT(VIT), float32[B, S, S, 3], gives=bfloat16[B, 10, D]),
    ran(vit.cubic_matrix, T, U, True, gives=float64[U, T]),
    # From four patches a side.
    ran(vit.resize_positions, float32[17, D], 4 * b, VIT, False, gives=float32[10, D]),
]

# Adapters of a matrix with heads that is stacked over layers, beside one without any.
MATRICES = {"query": {"kernel": bfloat16[L, D, H, d]}, "up": {"kernel": bfloat16[D, F]}}
BASE = lora.Adaptable(MATRICES, {"query": lora.Matrix(1, 2), "up": lora.Matrix(1, 1)})
BEGUN = {"query": {"lora_a": float32[L, D, K], "lora_b": float32[L, K, H, d]}}
ATTACHED = {"query": MATRICES["query"] | BEGUN["query"], "up": MATRICES["up"]}
PAIR = lora.Pair(*BEGUN["query"].values(), 1)
SETTINGS = lora.Settings(K, language="query")

ADAPTERS = [
    ran(
        lora.adaptable,
        lambda key: layers.Dense(D, name="dense").init(key, jnp.zeros((B, F)))["params"],
        then=lambda base: base.shapes,
        gives={"kernel": float32[F, D], "bias": float32[D]},
    ),
    traced(lora.fresh, KEY, "language", BASE, SETTINGS, gives=BEGUN),
    traced(lora.attach, MATRICES, BEGUN, 2.0, gives=ATTACHED),
    traced(
        lora.assemble,
        *({"lora": {"language": BEGUN}, "other": float32[D]}, {"language": MATRICES}, 2.0),
        gives=({"other": float32[D]}, {"language": ATTACHED}),
    ),
    traced(lora.bare, ATTACHED, gives=MATRICES),
    ran(lora.pairs, ATTACHED, gives={"query/kernel": lora.Pair(*BEGUN["query"].values(), int)}),
    ran(lora.Pair.at, PAIR, (0,), gives=lora.Pair(float32[D, K], float32[K, H, d], int)),
    traced(lora.Pair.product, lora.Pair(*BEGUN["query"].values(), 1), gives=float32[L, D, H, d]),
    traced(lora.merge, ATTACHED, gives=MATRICES),
]

PROMISES = LAYERS + ADAPTERS + QFORMERS + STAGES + ENCODERS
