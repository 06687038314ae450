"""Stage 2 in one piece: its loss and its texts against a plain rendering, row by row, without a cache."""

import functools
import pathlib
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from blip2_jax import ahead_of_time, tasks, trainer
from blip2_jax.data.pipeline import check_batch
from blip2_jax.decoding import GenerationConfig
from blip2_jax.models.layers import causal_mask
from blip2_jax.monitoring.metrics import read_metrics
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
    batch = task.batches.collate([task.batches.prepare_caption(example) for example in examples])
    found = task.objective.loss(trainable, task.frozen, batch, jax.random.key(0))

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
    texts = [
        text for (text,) in task.writing.write(task.language(trainable), soft_prompt, prompts, GenerationConfig(5))
    ]
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        ids = task.tokenizer.encode(prompt)
        for _ in range(5):
            ids.append(int(plain_logits(task, soft_prompt[row], ids)[-1].argmax()))
        assert task.tokenizer.decode(ids[len(ids) - 5 :]).strip() == text


BARE = {"init": "scratch", "data.begin": "", "data.prompt": "", "data.end": ""}


def test_an_encoder_reads_the_beginning_of_a_caption_and_the_decoder_writes_its_end(folder, t5):
    task = tasks.create(tiny.recipe("stage2", folder, llm=t5, **BARE, **{"data.split_captions": True}))
    tokenizer, end = task.tokenizer, task.tokenizer.end
    text = "a red square of a blue circle"
    whole = tokenizer.encode_target(text, task.config.data.max_text_tokens)
    assert len(whole) == 6
    places = set()
    for seed in range(40):
        found = task.batches.prepare_caption({"caption": text}, np.random.default_rng(seed))
        assert found == task.batches.prepare_caption({"caption": text}, np.random.default_rng(seed))
        *beginning, last = found["prompt_ids"]
        assert last == end
        assert beginning + found["target_ids"] == whole
        assert len(beginning) <= task.batches.lengths[0] - 1
        places.add(len(beginning))
    assert places == {1, 2}  # Of five words and an end.
    # Without a generator, in evaluation, the whole caption behind the prompt; one token cannot be parted.
    assert task.batches.prepare_caption({"caption": text}) == {
        "caption": text,
        "prompt_ids": [end],
        "target_ids": whole,
    }
    short = task.batches.prepare_caption({"caption": ""}, np.random.default_rng(0))
    assert (short["prompt_ids"], len(short["target_ids"])) == ([end], 2)


def test_captions_are_parted_for_an_encoder_alone(folder):
    with pytest.raises(ValueError, match=r"data\.split_captions with a language model 'llama'"):
        tasks.create(tiny.recipe("stage2", folder, **BARE, **{"data.split_captions": True}))


@pytest.mark.parametrize("predicted", [False, True])
def test_the_token_before_a_text_without_a_prompt_is_predicted_on_request(folder, predicted):
    bos = {"data.bos": "<|endoftext|>", "compat.bos_target": predicted}
    task = tasks.create(tiny.recipe("stage2", folder, **(BARE | bos)))
    found = task.batches.prepare_caption({"caption": "a red"})
    assert found["prompt_ids"] == ([] if predicted else [0])
    assert found["target_ids"] == [0] * predicted + task.tokenizer.encode_target("a red", 6 - predicted)
    long = task.batches.prepare_caption({"caption": "a red square of a blue circle of a"})
    assert len(long["target_ids"]) == task.config.data.max_text_tokens == task.batches.lengths[1]
    assert task.batches.lengths[0] == len(found["prompt_ids"])
    prompted = tasks.create(tiny.recipe("stage2", folder, **(BARE | bos | {"data.prompt": "a"})))
    assert prompted.batches.prepare_caption({"caption": "red"})["prompt_ids"] == [0, *task.tokenizer.encode("a")]


@pytest.mark.parametrize(("variant", "lengths"), [("opt_2_7b", (1, 32, 33)), ("flan_t5_xl", (16, 32, 33))])
def test_lengths_of_the_papers_recipes(variant, lengths):
    config = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "configs" / "stage2.py"))["get_config"](variant)
    task = ahead_of_time.create_task(config, None)
    assert task.batches.lengths == lengths
    assert task.objective.begin == ()


def test_an_encoder_decoder_and_instructions_train_and_write(folder, t5, tmp_path):
    instructed = {"data.prompt": "a red", "instruct": True, "pieces": 2, "compat.llm_dropout": True, "llm_remat": True}
    config = tiny.recipe("stage2", folder, llm=t5, total_steps=2, mesh="data=4,fsdp=2", **(BARE | instructed))
    config.batch_size = 16
    trainer.train(config, tmp_path / "run")
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert np.isfinite(last["loss"])
    assert f"eval/{config.data.eval}/caption/cider" in last
    task, trainable = tasks.load_trained(tmp_path / "run")
    batch = task.batches.collate(
        [task.batches.prepare_caption(example | {"caption": "a"}) for example in _examples(task, 16)]
    )
    check_batch(batch, task.schema())
    # [CLS] a red [SEP]
    assert batch["instruction_ids"][3].tolist() == [2, 5, 7, 3]
    embeds = jnp.asarray(batch["image_embeds"])
    other = batch | {"instruction_ids": np.full_like(batch["instruction_ids"], 6)}
    assert not np.allclose(task.soft_prompt(trainable, embeds, batch), task.soft_prompt(trainable, embeds, other))
    # What is read of the image depends on what is asked.
    asked = [task.read(trainable, embeds, [prompt] * 16) for prompt in ("a red", "a red blue")]
    assert not np.allclose(*asked)


def _examples(task, count):
    pictures = task.pictures(task.config.data.train, training=False)
    return [pictures.example(index) for index in range(count)]


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
