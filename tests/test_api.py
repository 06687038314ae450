"""The three lines of Python: a checkpoint of ours, or a directory of transformers, on pictures."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from blip2_jax import api, generate
from blip2_jax.decoding import GenerationConfig
from blip2_jax.dialogue import Dialogue

pytestmark = pytest.mark.usefixtures("own_cache")
GOLDEN = pathlib.Path(__file__).parent / "golden" / "hf"


@pytest.fixture
def pictures(folder, stage2):
    return sorted((folder / "pictures").glob("*.png"))[:3]


@pytest.fixture(scope="module")
def first(stage1):
    return api.load(stage1)


@pytest.fixture(scope="module")
def second(stage2):
    return api.load(stage2)


@pytest.fixture
def transformers_directory(tmp_path):
    """A BLIP-2 that transformers wrote with, and a tokenizer whose words are the numbers of its tokens."""
    folder = shutil.copytree(GOLDEN / "blip2_opt", tmp_path / "blip2")
    meta = json.loads((folder / "meta.json").read_text())
    end = meta["generate_kwargs"]["picked_eos"]
    size = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    words = {"\n" if number == end else f"w{number}": number for number in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer.post_processor = processors.TemplateProcessing("w2 $A", special_tokens=[("w2", 2)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_directory_of_transformers_writes_what_it_wrote_there(transformers_directory):
    model = api.load(transformers_directory)
    task = model.task
    with (
        np.load(transformers_directory / "inputs.npz") as inputs,
        np.load(transformers_directory / "outputs.npz") as outputs,
    ):
        pixels, ids, mask = (inputs[name] for name in ("pixel_values", "gen_input_ids", "gen_attention_mask"))
        recorded = {
            name: outputs[f"gen_{name}.sequences"][:, ids.shape[1] :] for name in ("greedy_eos", "beam5_eos_lp0")
        }
    embeds = task.encoder.module.apply({"params": task.vision_parameters}, jnp.asarray(pixels.transpose(0, 2, 3, 1)))
    queries = task.blip2.qformer.queries
    # Behind the images and the first token, which are not of the prompt's text.
    rows = [row[seen.astype(bool)][queries + 1 :] for row, seen in zip(ids, mask, strict=True)]
    prompts = [" ".join(f"w{token}" for token in row) for row in rows]
    soft_prompt = task.read(model.trainable, embeds, prompts)
    for name, config in (
        ("greedy_eos", GenerationConfig(8)),
        ("beam5_eos_lp0", GenerationConfig(8, num_beams=5, length_penalty=0.0)),
    ):
        written = task.writing.write(task.language(model.trainable), soft_prompt, prompts, config)
        for (text,), tokens in zip(written, recorded[name].tolist(), strict=True):
            tokens = tokens[: tokens.index(task.tokenizer.end)] if task.tokenizer.end in tokens else tokens
            assert text.split() == [f"w{token}" for token in tokens]


def test_what_is_no_blip2_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes((GOLDEN / "blip2_opt" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"config\.json is of a 'bert'; expected one of"):
        api.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        api.load(tmp_path / "nowhere")


def test_captions_answers_and_choices(second, pictures):
    texts = second.caption(pictures, GenerationConfig(4))
    assert len(texts) == 3
    assert all(isinstance(text, str) for text in texts)
    several = second.caption(pictures, GenerationConfig(4, num_beams=3, num_return_sequences=2))
    assert [len(row) for row in several] == [2, 2, 2]
    answers = second.answer(pictures, ["what?"] * 3, GenerationConfig(4))
    assert answers == second.write(pictures, ["Question: what? Answer:"] * 3, GenerationConfig(4))
    likely = second.choose(pictures, ["a"] * 3, [["a red square", "a"]] * 3)
    assert likely.shape == (3, 2)
    assert (likely < 0).all()
    with pytest.raises(ValueError, match="3 pictures and 2 prompts"):
        second.write(pictures, ["a"] * 2)


def test_pictures_may_be_arrays_and_pil(second, pictures):
    images = [Image.open(picture) for picture in pictures]
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    config = GenerationConfig(4)
    assert second.caption(images, config) == second.caption(arrays, config) == second.caption(pictures, config)
    with pytest.raises(ValueError, match=r"a picture float64\[4, 4\]: expected uint8\[H, W, 3\]"):
        second.caption([np.zeros((4, 4))])
    with pytest.raises(ValueError, match="no pictures"):
        second.caption([])


def test_features_and_scores_of_stage_1(first, pictures):
    texts = ["a red square", "a blue circle", "a red circle"]
    image, text = first.image_features(pictures), first.text_features(texts)
    np.testing.assert_allclose(np.linalg.norm(image, axis=-1), 1, rtol=1e-5)
    similarity = first.similarity(pictures, texts)
    np.testing.assert_allclose(similarity.itc, np.einsum("bqe,be->bq", image, text).max(1), rtol=1e-4)
    assert ((similarity.itm > 0) & (similarity.itm < 1)).all()
    assert first.multimodal_features(pictures, texts).shape[:2] == image.shape[:2]
    assert len(first.caption(pictures, GenerationConfig(4))) == 3
    np.testing.assert_allclose(first.attention(pictures).sum(-1), 1, rtol=1e-4)
    with pytest.raises(ValueError, match="no language model"):
        first.answer(pictures, ["what?"] * 3)


def test_one_bad_picture_does_not_lose_the_others(stage2, pictures, tmp_path, capsys):
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    files = [pictures[0], text, pictures[1]]
    arguments = ["--checkpoint", str(stage2), "--max_new_tokens", "4", "--attention", str(tmp_path / "maps")]
    with pytest.raises(SystemExit) as ended:
        generate.main([*arguments, "--image", *map(str, files)])
    assert ended.value.code == 1
    written = capsys.readouterr()
    rows = [line.partition("\t") for line in written.out.splitlines()]
    assert [row[0] for row in rows] == list(map(str, files))
    assert rows[1][2] == ""
    assert "text.jpg: not a picture" in written.err
    assert len(list((tmp_path / "maps").glob("*.png"))) == 2


def test_a_prompt_longer_than_the_context_is_refused(transformers_directory):
    model = api.load(transformers_directory)
    pictures = [np.zeros((28, 28, 3), np.uint8)]
    with pytest.raises(ValueError, match=r"the prompt 'w4 .* more than the \d+ positions of the language model"):
        model.write(pictures, [" ".join(["w4"] * 200)], GenerationConfig(4))


def test_a_dialogue_keeps_what_was_said():
    asked = []
    dialogue = Dialogue(lambda prompt: asked.append(prompt) or f"answer {len(asked)}.", "Question: {} Answer:".format)
    assert dialogue.ask("what is it?") == "answer 1."
    assert dialogue.ask(" why? ") == "answer 2."
    assert asked[1] == "Question: what is it? Answer: answer 1. Question: why? Answer:"
    dialogue.kept = 1
    assert dialogue.prompt("how?") == "Question: why? Answer: answer 2. Question: how? Answer:"
    with pytest.raises(ValueError, match="the question is empty"):
        dialogue.ask(" ")
    assert len(dialogue.turns) == 2


def test_interactive(stage2, pictures, monkeypatch, capsys):
    lines = iter(["what?", "", "why?"])

    def answer(_prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    generate.main(["--checkpoint", str(stage2), "--image", str(pictures[0]), "--interactive", "--max_new_tokens", "3"])
    assert len(capsys.readouterr().out.splitlines()) == 2
