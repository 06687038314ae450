"""Whoever shares the batch or the mesh: a row's text is its own."""

import jax
import numpy as np
import pytest

from blip2_jax.decoding import GenerationConfig
from tests.decoding.models import END, KINDS, draws, prefixes, writer
from tests.meshes import surrounding

HOW = {
    "greedy": GenerationConfig(9, 2),
    "beams": GenerationConfig(9, num_beams=5, num_return_sequences=3, repetition_penalty=1.2, no_repeat_ngram_size=2),
    "lavis": GenerationConfig(9, num_beams=4, length_penalty=-1.0, convention="lavis"),
    "nucleus": GenerationConfig(9, temperature=0.9, top_p=0.9, num_return_sequences=2),
}
COUNT, LONGEST = 64, 7


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_sixty_four_ragged_prompts_together_alone_and_on_a_mesh(kind, how):
    write = writer(kind, HOW[how])
    embeds, mask = prefixes(COUNT, LONGEST)
    rows = np.arange(COUNT)
    together = write(embeds, mask, draws(rows))
    assert len(np.unique(together.tokens[:, 0], axis=0)) > (3 if kind == "qformer" else COUNT // 4)
    assert kind == "qformer" or 0 < (together.tokens == END).any(-1).mean() < 1
    for row in rows:
        alone = write(embeds[row : row + 1], mask[row : row + 1], draws(rows[row : row + 1]))
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=2e-4, atol=2e-4)
    for mesh in ("data=8", "data=2,fsdp=2,tensor=2"):
        with surrounding(mesh):
            np.testing.assert_array_equal(write(embeds, mask, draws(rows)).tokens, together.tokens)


def test_padding_may_stand_anywhere():
    embeds, mask = prefixes(8, LONGEST)
    for kind in ("opt", "llama"):
        write = writer(kind, HOW["beams"])
        expected = write(embeds, mask, draws(range(8))).tokens
        to_the_right = np.argsort(mask, axis=1, kind="stable")
        moved = np.take_along_axis(embeds, to_the_right[..., None], 1), np.take_along_axis(mask, to_the_right, 1)
        np.testing.assert_array_equal(write(*moved, draws(range(8))).tokens, expected)
    jax.clear_caches()
