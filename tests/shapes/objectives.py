"""Losses: blip2_jax/objectives."""

from __future__ import annotations

from blip2_jax.objectives import candidates, contrastive, diversity, language_modeling, matching
from blip2_jax.objectives.candidates import Pairs, Side, Sums, Table
from tests.shapes.lengths import B, C, D, E, N, Q, T, V, b
from tests.shapes.promises import KEY, ROWS, bfloat16, bool_, float32, int32, on_a_device, traced, uint32


def side(*shape: int) -> Side:
    return Side(int32[shape], uint32[*shape, 2], uint32[*shape, 2], bool_[shape])


def pairs(rows: int) -> Pairs:
    return Pairs(uint32[rows, 2], uint32[rows, 2], bool_[rows])


# B captions fill N blocks of C, the last one not whole.
TABLE = Table("image_or_text", side(b), side(N, C), float32[N, C, E])
IMAGES, TEXTS, TEMPERATURE = bfloat16[B, Q, E], bfloat16[B, E], float32[()]
SUMS = Sums(*[float32[b]] * 5)
HEAD = bfloat16[B, T, D], bfloat16[V, D], float32[V], int32[B, T], float32[B, T]
WEIGHTS = matching.MatchingWeights(*[float32[B]] * 3)

PROMISES = [
    traced(candidates.query_cosines, bfloat16[b, Q, E], bfloat16[C, E], gives=float32[b, Q, C]),
    traced(candidates.similarities, bfloat16[b, Q, E], bfloat16[C, E], gives=float32[b, C]),
    traced(candidates.in_blocks, bfloat16[B, E], C, gives=bfloat16[N, C, E]),
    traced(candidates.from_blocks, bfloat16[N, C, E], B, gives=bfloat16[B, E]),
    traced(Table.same, TABLE, side(C), gives=bool_[b, C]),
    traced(Table.real, TABLE, side(C), gives=bool_[b, C]),
    traced(Table.count, TABLE, gives=float32[()]),
    traced(Sums.log_total, SUMS, gives=float32[b]),
    on_a_device(candidates.table, ROWS, float32[b, E], pairs(b), C, gives=TABLE._replace(by=str)),
    on_a_device(candidates.own_part, ROWS, bfloat16[B, E], gives=bfloat16[b, E]),
    on_a_device(candidates.line_sums, ROWS, TABLE, float32[b, Q, E], TEMPERATURE, gives=(SUMS, SUMS)),
    traced(contrastive.contrastive_loss, IMAGES, TEXTS, TEMPERATURE, pairs(B), block=C, gives=float32[()]),
    traced(
        matching.hard_negatives,
        *(KEY, IMAGES, TEXTS, TEMPERATURE, pairs(B)),
        block=C,
        gives=matching.HardNegatives(int32[B], int32[B], bool_[B], float32[B], float32[B]),
    ),
    traced(matching.matching_weights, int32[B], bool_[B], gives=WEIGHTS),
    traced(
        matching.matching_loss,
        *(bfloat16[B, 2], int32[B], WEIGHTS),
        gives=matching.MatchingLoss(*[float32[()]] * 3),
    ),
    traced(diversity.query_diversity, bfloat16[B, Q, D], float32[B], gives=diversity.Diversity(*[float32[()]] * 2)),
    traced(
        language_modeling.next_token_targets,
        *(int32[B, T], bool_[B, T]),
        gives=(int32[B, T], bool_[B, T]),
    ),
    traced(language_modeling.token_weights, bool_[B, T], N, gives=float32[B, T]),
    traced(language_modeling.token_losses, *HEAD, label_smoothing=0.1, gives=float32[B, T]),
    traced(language_modeling.language_modeling_loss, *HEAD, label_smoothing=0.1, gives=float32[()]),
]
