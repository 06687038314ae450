"""Stage 2 in one piece: its loss and its texts against a plain rendering, row by row, without a cache."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from blip2_jax import tasks
from blip2_jax.models.layers import causal_mask
from tests import tiny

pytestmark = pytest.mark.usefixtures("own_cache")
TEXTS = ["a red square", "a blue circle of a", "a"]


@pytest.fixture(scope="module", params=["<|endoftext|>", ""], ids=["begin", "no begin"])
def stage2(request, folder):
    config = tiny.recipe("stage2", folder, init="scratch", batch_size=3, **{"data.begin": request.param})
    task = tasks.create(config)
    trainable = task.initialize(jax.random.key(0))
    embeds = jax.random.normal(jax.random.key(1), (3, task.encoder.tokens, task.encoder.width))
    return task, trainable, embeds


@functools.partial(jax.jit, static_argnums=0)
def row_logits(task, language, soft_prompt, ids):
    """float[1 + T, V] of one row (begin, soft prompt, tokens), from the last query on."""
    model = task.language_model.bind({"params": language})
    begin = model.embed(jnp.asarray([task.tokenizer.begin], jnp.int32))
    row = jnp.concatenate([begin, soft_prompt[None], model.embed(ids[None])], axis=1)
    length = row.shape[1]
    hidden, _ = model(row, jnp.arange(length)[None], causal_mask(length))
    return (hidden @ model.head().T)[0, begin.shape[1] + soft_prompt.shape[0] - 1 :]


def plain_logits(task, soft_prompt, ids):
    """The same for a list of tokens; what fills it up at the end is hidden by causality."""
    filled = jnp.asarray([*ids, *[0] * (64 - len(ids))], jnp.int32)
    return row_logits(task, task.frozen["language"], soft_prompt, filled)[: len(ids) + 1]


def test_the_loss_is_that_of_the_targets_behind_image_and_prompt(stage2):
    task, trainable, embeds = stage2
    examples = [
        {"caption": text, "key": str(i), "image_embeds": np.asarray(embeds[i]), "image_id": np.zeros(2, np.uint32)}
        for i, text in enumerate(TEXTS)
    ]
    batch = task.collate([task.prepare_caption(example) for example in examples])
    found, _ = task.loss(trainable, task.frozen, batch, jax.random.key(0))

    soft_prompt, losses = task.soft_prompt(trainable, embeds), []
    prompt = task.tokenizer.encode(task.config.data.prompt)
    for row, text in enumerate(TEXTS):
        target = task.tokenizer.encode_target(text, task.config.data.max_text_tokens)
        log_probability = jax.nn.log_softmax(plain_logits(task, soft_prompt[row], [*prompt, *target]))
        # The logits of position t are for token t: the first are those of the last query.
        losses += [-log_probability[len(prompt) + i, token] for i, token in enumerate(target)]
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)


def test_the_text_is_the_likeliest_token_after_another(stage2):
    task, trainable, embeds = stage2
    soft_prompt = np.asarray(task.soft_prompt(trainable, embeds))
    prompts = ["A drawing of", "Question: category? Answer:", ""]
    for row, (prompt, text) in enumerate(zip(prompts, task.generate(soft_prompt, prompts, 5), strict=True)):
        ids = task.tokenizer.encode(prompt)
        for _ in range(5):
            ids.append(int(plain_logits(task, soft_prompt[row], ids)[-1].argmax()))
        assert task.tokenizer.decode(ids[len(ids) - 5 :]).strip() == text


@pytest.mark.parametrize(("stage", "part"), [("stage1", "bert"), ("stage2", "llm")])
def test_a_vocabulary_of_another_size_is_refused(stage, part, folder, tmp_path):
    """Tokens without a row would silently be read as the last one."""
    config = tiny.recipe(stage, folder, init="scratch")
    shutil.copytree(config[part].removeprefix("hf:"), tmp_path / part)
    tokenizer = Tokenizer.from_file(str(tmp_path / part / "tokenizer.json"))
    tokenizer.add_tokens(["one more", "and another"])
    tokenizer.save(str(tmp_path / part / "tokenizer.json"))
    config[part] = f"hf:{tmp_path / part}"
    task = tasks.create(config)
    with pytest.raises(ValueError, match=rf"{part}: the tokenizer.* do not belong together"):
        task.caption_tokenizer if part == "bert" else task.tokenizer  # noqa: B018
