"""Language models: blip2_jax/models/language, in bfloat16, and decoding from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from blip2_jax import decoding
from blip2_jax.decoding import Draws, GenerationConfig, Written, beam_search, log_probabilities, sampling
from blip2_jax.decoding.beam_search import BeamSearch
from blip2_jax.decoding.constraints import Constraints
from blip2_jax.decoding.lines import Lines, places
from blip2_jax.decoding.sampling import Sampling
from blip2_jax.models import language
from blip2_jax.models.blip2 import ImageTextModel
from blip2_jax.models.language import decoder, llama, opt, t5
from blip2_jax.models.language.decoder import Decoder
from blip2_jax.models.language.t5 import T5, Encoded, RelativeBias
from tests.shapes.lengths import B, C, F, H, K, L, M, N, S, T, U, V, d
from tests.shapes.models import BLIP2, CACHE, NUMBERS, keys
from tests.shapes.promises import KEY, bfloat16, bool_, float32, int32, ran, traced

LOW = {"dtype": jnp.bfloat16}
LLAMA = llama.LlamaConfig(V, M, L, N, K, d, F, tied_head=False, **LOW)
OPT = opt.OPTConfig(V, M, L, N, N, d, F, max_positions=S, dropout=0.1, **LOW)
FLAN = t5.T5Config(V, M, 2, L, H, d, F, buckets=8, max_distance=S, dropout=0.1, **LOW)
SIGHT = t5.Sight(int32[T], int32[U], bool_[B, 1, T, U])
WORDS, PLACES, SEEN = bfloat16[B, T, M], int32[B, T], bool_[B, 1, T, S]
OFFSET, LOGITS = int32[()], float32[B, T, V]

DECODERS = [
    traced(
        language.join,
        *(int32[B, T], bool_[B, T], int32[B, U], bool_[B, U], S),
        gives=language.Row(int32[B, S], bool_[B, S], bool_[B, S]),
    ),
    traced(decoder.one_by_one, keys(L, B, S, K, d), gives=(keys(B, S, K, d),) * L),
    traced(Decoder.embed, llama.Llama(LLAMA), int32[B, T], gives=WORDS),
    traced(Decoder.place, llama.Llama(LLAMA), WORDS, PLACES, gives=WORDS),
    traced(Decoder.__call__, llama.Llama(LLAMA), WORDS, PLACES, bool_[1, 1, T, T], gives=(WORDS, None)),
    traced(
        Decoder.__call__,
        *(llama.Llama(LLAMA), WORDS, PLACES, SEEN, keys(L, B, S, K, d), OFFSET),
        gives=(WORDS, keys(L, B, S, K, d)),
    ),
    traced(
        Decoder.__call__,
        *(opt.OPT(OPT), WORDS, PLACES, SEEN, keys(L, B, S, N, d), OFFSET, NUMBERS),
        gives=(WORDS, keys(L, B, S, N, d)),
    ),
    traced(Decoder.head, llama.Llama(LLAMA), gives=float32[V, M]),
    traced(Decoder.head, opt.OPT(OPT), gives=float32[V, M]),
    traced(Decoder.initialize, opt.OPT(OPT), int32[B, T], gives=LOGITS),
    traced(
        decoder.update_cache,
        *(keys(B, S, K, d), *keys(B, T, K, d), OFFSET),
        gives=(keys(B, S, K, d), keys(B, S, K, d)),
    ),
    traced(decoder.update_cache, None, *keys(B, T, K, d), OFFSET, gives=(keys(B, T, K, d), None)),
    traced(decoder.empty_cache, LLAMA, B, S, gives=keys(L, B, S, K, d)),
    ran(llama.Rope.frequencies, llama.Rope(), d // 2, gives=float32[d // 2]),
    traced(llama.rotate, bfloat16[B, T, K, d], PLACES, llama.Rope(), gives=bfloat16[B, T, K, d]),
    traced(
        llama.LlamaLayer.__call__,
        *(llama.LlamaLayer(LLAMA), WORDS, keys(B, S, K, d), PLACES, SEEN, OFFSET, None),
        gives=(WORDS, keys(B, S, K, d)),
    ),
    traced(
        opt.OPTLayer.__call__,
        *(opt.OPTLayer(OPT), WORDS, keys(B, S, N, d), PLACES, SEEN, OFFSET, NUMBERS),
        gives=(WORDS, keys(B, S, N, d)),
    ),
    traced(opt.OPT.place, opt.OPT(OPT), WORDS, PLACES, gives=WORDS),
]

READ = bfloat16[B, S, M]
ENCODED, BIAS, ITSELF = Encoded(keys(L, B, S, H, d), bool_[B, S]), float32[1, H, S, S], bool_[B, 1, 1, S]
# A cache of the decoder has other places than the encoder's output.
GROWN, PAST, PAST_BIAS = keys(B, U, H, d), bool_[1, 1, T, U], float32[1, H, T, U]

ENCODER_DECODERS = [
    traced(t5.relative_buckets, int32[T, S], True, 8, S, gives=int32[T, S]),
    traced(RelativeBias.__call__, RelativeBias(FLAN, True), int32[T], int32[S], gives=float32[1, H, T, S]),
    traced(
        t5.Attention.__call__,
        *(t5.Attention(FLAN), WORDS, None, GROWN, OFFSET, PAST, PAST_BIAS, NUMBERS),
        gives=(WORDS, GROWN),
    ),
    traced(t5.FeedForward.__call__, t5.FeedForward(FLAN), WORDS, NUMBERS, gives=WORDS),
    traced(t5.EncoderLayer.__call__, t5.EncoderLayer(FLAN), READ, None, ITSELF, BIAS, NUMBERS, gives=(READ, None)),
    traced(
        t5.DecoderLayer.__call__,
        *(t5.DecoderLayer(FLAN), WORDS, keys(B, S, H, d), GROWN, OFFSET, PAST, PAST_BIAS, ITSELF, NUMBERS),
        gives=(WORDS, GROWN),
    ),
    traced(t5.EncoderProjection.__call__, t5.EncoderProjection(FLAN), READ, None, gives=(READ, keys(B, S, H, d))),
    traced(T5.embed, T5(FLAN), int32[B, T], gives=WORDS),
    traced(T5.encode_hidden, T5(FLAN), READ, bool_[B, S], NUMBERS, gives=READ),
    traced(T5.encode, T5(FLAN), READ, bool_[B, S], NUMBERS, gives=ENCODED),
    traced(T5.decode, T5(FLAN), ENCODED, WORDS, None, 0, NUMBERS, gives=(WORDS, None)),
    traced(
        T5.decode,
        *(T5(FLAN), ENCODED, WORDS, keys(L, B, U, H, d), OFFSET, NUMBERS),
        gives=(WORDS, keys(L, B, U, H, d)),
    ),
    traced(
        T5.decode,
        *(T5(FLAN), ENCODED, WORDS, keys(L, B, U, H, d), OFFSET, None, SIGHT),
        gives=(WORDS, keys(L, B, U, H, d)),
    ),
    traced(T5.head, T5(FLAN), gives=float32[V, M]),
    traced(T5.initialize, T5(FLAN), int32[B, T], gives=LOGITS),
    traced(t5.empty_cache, FLAN, B, S, gives=keys(L, B, S, H, d)),
]


def parameters(model) -> dict:
    """Of a language model, without values."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(lambda key: model.init(key, tokens, method="initialize"), KEY)["params"]


def image_text_parameters() -> dict:
    """Of the model of stage 1, as far as captions need it, without values."""
    method, ids = ImageTextModel.caption_features, jnp.zeros((B, T), jnp.int32)
    init = lambda key, cache: ImageTextModel(BLIP2).init(key, cache, ids, ids > 0, method=method)
    return jax.eval_shape(init, KEY, CACHE)["params"]


# N texts of U tokens a row: drawn, or the beams of a search.
DRAWN = GenerationConfig(U, 1, num_return_sequences=N, temperature=0.5, top_p=0.9, top_k=3)
BEAMS = GenerationConfig(U, num_beams=N, num_return_sequences=2, repetition_penalty=1.2, no_repeat_ngram_size=2)
DRAWS, SHORT = Draws(KEY, NUMBERS), GenerationConfig(T, num_beams=2)
LINES, SAID, FEW = Lines(int32[B, N, U], int32[B, N, U]), float32[B, N, V], int32[B, N]
RULES, HELD = Constraints(BEAMS, 2, int32[B, S]), Constraints(BEAMS, 2, np.zeros((B, S), np.int32))
REAL_DRAWS = Draws(jax.random.key(0), np.arange(B, dtype=np.uint32))
SAMPLING, SEARCH = Sampling(DRAWN, 2, HELD, REAL_DRAWS), BeamSearch(BEAMS, 2, HELD)
SAMPLED = sampling.State(bool_[B, N], float32[B, N], int32[B, N])
SEARCHED = beam_search.State(bool_[B], float32[B, N], int32[B, N, U], float32[B, N])

DECODING = [
    *(
        traced(
            decoding.generate,
            *(model, parameters(model), WORDS, bool_[B, T], config, 2, DRAWS, int32[B, S]),
            gives=Written(int32[B, returned, U], float32[B, returned]),
        )
        for model in (llama.Llama(LLAMA), opt.OPT(OPT), T5(FLAN))
        for config, returned in ((DRAWN, N), (BEAMS, 2))
    ),
    *(
        traced(
            log_probabilities,
            *(model, parameters(model), WORDS, bool_[B, T], int32[B, C, U], bool_[B, C, U]),
            gives=float32[B, C],
        )
        for model in (llama.Llama(LLAMA), T5(FLAN))
    ),
    traced(
        decoding.caption,
        *(ImageTextModel(BLIP2), image_text_parameters(), CACHE, SHORT, 1, 2, DRAWS),
        gives=Written(int32[B, 1, T], float32[B, 1]),
    ),
    ran(GenerationConfig.lines.fget, BEAMS, gives=int),
    traced(places, BEAMS, gives=int32[U * N]),
    traced(Lines.extended, LINES, FEW, FEW, OFFSET, gives=LINES),
    traced(Lines.seen, LINES, OFFSET, gives=bool_[B, N, U * N]),
    traced(Constraints.__call__, RULES, SAID, int32[B, N, U], OFFSET, gives=SAID),
    traced(Sampling.start, SAMPLING, B, gives=SAMPLED),
    traced(Sampling.choose, SAMPLING, SAID, OFFSET, LINES, SAMPLED, gives=(LINES, SAMPLED)),
    traced(Sampling.finish, SAMPLING, LINES, SAMPLED, gives=Written(int32[B, N, U], float32[B, N])),
    traced(BeamSearch.start, SEARCH, B, gives=SEARCHED),
    traced(BeamSearch.choose, SEARCH, SAID, OFFSET, LINES, SEARCHED, gives=(LINES, SEARCHED)),
    traced(BeamSearch.finish, SEARCH, LINES, SEARCHED, gives=Written(int32[B, 2, U], float32[B, 2])),
    traced(sampling.likeliest_one, SAID, gives=FEW),
    traced(sampling.draw, SAID, DRAWN, DRAWS, OFFSET, gives=FEW),
    traced(sampling.likeliest, float32[B, V], float32[B, V], 0.9, gives=bool_[B, V]),
]

PROMISES = DECODERS + ENCODER_DECODERS + DECODING
