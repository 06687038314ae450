"""Checkpoints in and out: transformers' directories without loss, LAVIS's files, and what must be refused."""

import json
import pathlib
import re
import runpy
import shutil

import chex
import jax
import ml_collections
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from blip2_jax import convert, params, tasks, trainer
from blip2_jax.checkpoints import mapping, qformer, store, trained
from blip2_jax.models.layers import causal_mask
from tests import tiny
from tests.originals import LANGUAGE, saved

VIT = {"model.image_positions": False, "model.text_pooling": "cls", "model.ln_vision_epsilon": 1e-5}


def recipe(stage, folder, **changes):
    """A tiny recipe whose image encoder transformers knows."""
    tiny.recipe(stage, folder)  # Makes the tiny models.
    return tiny.recipe(stage, folder, vision=f"hf:{folder / 'vit'}", **VIT, **changes)


def random_tree(config):
    """Parameters that are nowhere what initialisation gives."""
    rng = np.random.default_rng(5)
    noise = lambda leaf: (0.3 * rng.normal(size=leaf.shape) + (leaf.ndim == 0)).astype(np.float32)
    return jax.tree.map(lambda leaf: noise(leaf), tasks.create(config).shapes())


@pytest.fixture(scope="module", params=["stage1", "stage2", "instruct"])
def checkpoint(request, folder, tmp_path_factory):
    """The config of a stage, its parameters and where they are saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP2_JAX_CACHE", str(folder / "cache"))
        instruct = {"instruct": True} if request.param == "instruct" else {}
        config = recipe("stage2" if instruct else request.param, folder, **instruct)
        tree = random_tree(config)
        path = tmp_path_factory.mktemp("checkpoint") / "ours"
        task = tasks.create(config)
        store.save_alone(path, tree, json.loads(config.to_json()), task.frozen_identity())
        yield config, tree, path


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "theirs"
    convert.export_checkpoint(str(checkpoint[2]), output)
    return output


def changed(config, **changes):
    config = ml_collections.ConfigDict(json.loads(config.to_json()))
    config.update_from_flattened_dict(changes)
    return config


def test_there_and_back_without_loss(checkpoint, exported, tmp_path):
    config, tree, _ = checkpoint
    # Sizes, pictures and, in stage 2, the language model come from the directory alone.
    parts = {part: f"hf:{exported}" for part in ("vision", "bert", "llm") if part in config}
    convert.import_checkpoint(changed(config, init=f"hf:{exported}", **parts), tmp_path / "back")
    again = store.load_trainable(tmp_path / "back")
    chex.assert_trees_all_equal(params.flatten(again), params.flatten(tree))
    if config.task == "stage1":
        assert (exported / qformer.HEADS_FILE).exists()
    _, facts = store.read_facts(tmp_path / "back")
    assert facts.keys() == ({"vision", "bert", "llm"} if config.task == "stage2" else {"vision", "bert"})


def test_the_language_model_is_copied_and_grows_by_the_image_token(checkpoint, exported, folder):
    if checkpoint[0].task == "stage1":
        return
    theirs, own = load_file(exported / "model.safetensors"), load_file(folder / "llama" / "model.safetensors")
    config = json.loads((exported / "config.json").read_text())
    rows = len(own["model.embed_tokens.weight"])
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (rows, rows + 1)
    tokenizer = tasks.create(checkpoint[0]).tokenizer
    assert config["text_config"]["eos_token_id"] == tokenizer.end == tokenizer.encode("\n")[0]
    for name, array in own.items():
        found = theirs[f"language_model.{name}"]
        np.testing.assert_array_equal(found[: len(array)], array, err_msg=name)
        assert len(found) == len(array) + (name == "model.embed_tokens.weight")


def test_large_weights_are_written_in_shards(checkpoint, exported, tmp_path, monkeypatch):
    monkeypatch.setattr("blip2_jax.checkpoints.export._SHARD_BYTES", 20_000)
    convert.export_checkpoint(str(checkpoint[2]), tmp_path / "sharded")
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    whole = load_file(exported / "model.safetensors")
    assert index["weight_map"].keys() == whole.keys()
    assert len(set(index["weight_map"].values())) > 3
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(load_file(tmp_path / "sharded" / file)[name], whole[name])
    config = changed(checkpoint[0], init=f"hf:{tmp_path / 'sharded'}")
    convert.import_checkpoint(config, tmp_path / "back")
    chex.assert_trees_all_equal(store.load_trainable(tmp_path / "back"), checkpoint[1])
    next((tmp_path / "sharded").glob("model-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"index\.json names .* model-00002-.* is not there"):
        convert.import_checkpoint(config, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def damage(exported, folder, change):
    """A copy of an exported directory, its tensors changed."""
    shutil.copytree(exported, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(next(name for name in t if re.fullmatch(r"qformer\.(embeddings\.)?layernorm\.bias", name))),
            r"no tensor 'qformer\..*layernorm\.bias', which 'qformer/embeddings_norm/bias' needs",
        ),
        (
            lambda t: t.update({"query_tokens": t["query_tokens"][:, :1].copy()}),
            r"'query_tokens' has shape \(1, 1, 24\), but 'qformer/query_tokens' needs \(1, 2, 24\)",
        ),
        (
            lambda t: t.pop("qformer.encoder.layer.2.crossattention.attention.key.weight"),
            r"no tensor 'qformer\.encoder\.layer\.2\.crossattention\.attention\.key\.weight', which",
        ),
        (
            lambda t: t.update({"qformer.encoder.layer.3.output_query.dense.bias": np.zeros(24, np.float32)}),
            "1 tensors of a Q-Former that this model has no place for",
        ),
    ],
    ids=["a leaf is missing", "a shape", "a layer is missing", "a layer too many"],
)
def test_damaged_tensors(checkpoint, exported, tmp_path, change, message):
    broken = damage(exported, tmp_path / "broken", change)
    config = changed(checkpoint[0], init=f"hf:{broken}")
    with pytest.raises(ValueError, match=message):
        convert.import_checkpoint(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_imported(checkpoint, exported, folder, tmp_path):
    config = checkpoint[0]
    with pytest.raises(ValueError, match="is a 'llama'; expected one of blip-2, instructblip"):
        convert.import_checkpoint(changed(config, init=f"hf:{folder / 'llama'}"), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        convert.import_checkpoint(changed(config, init=f"hf:{tmp_path / 'none'}"), tmp_path / "out")
    for nothing in ("", "scratch"):
        with pytest.raises(ValueError, match="nothing to import"):
            convert.import_checkpoint(changed(config, init=nothing), tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        convert.import_checkpoint(changed(config, init=f"hf:{exported}"), tmp_path / "there")
    with pytest.raises(FileExistsError, match="is there already"):
        convert.export_checkpoint(str(checkpoint[2]), tmp_path / "there")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text((exported / "config.json").read_text())
    whole = (exported / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut/model\.safetensors is truncated"):
        convert.import_checkpoint(changed(config, init=f"hf:{tmp_path / 'cut'}"), tmp_path / "out")


def test_a_model_that_transformers_lacks_is_not_exported(stage1, own_cache, tmp_path):
    with pytest.raises(ValueError, match="has no place for an image encoder other than EVA"):
        convert.export_checkpoint(str(stage1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inspect_allocates_nothing_and_sums(folder, own_cache):
    text = convert.describe(recipe("stage2", folder), 8)
    assert "trainable/qformer/query_tokens" in text
    line = next(line for line in text.splitlines() if line.startswith("frozen/language/layers/up/kernel"))
    assert line.split()[1:] == ["2x20x44", "float32", "no", "-,fsdp,tensor"]


def test_training_goes_on_from_what_was_imported(checkpoint, exported, own_cache, tmp_path):
    """With a ViT that runs in every step, its pictures not encoded before."""
    changes = {"init": f"hf:{exported}", "total_steps": 2, "log_every": 1, "data.feature_views": 0}
    trainer.train(changed(checkpoint[0], **changes), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(row["loss"]) for row in rows)


CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
COUNTS = {
    ("stage1", "eva_g"): 186_705_470,
    ("stage1", "clip_l"): 183_165_758,
    ("stage2", "opt_2_7b"): 107_133_696,
    ("stage2", "opt_6_7b"): 108_314_880,
    ("stage2", "flan_t5_xl"): 106_739_968,
    ("stage2", "flan_t5_xxl"): 108_314_880,
}


@pytest.mark.parametrize(("stage", "variant"), COUNTS)
def test_trainable_parameters_of_the_paper(stage, variant):
    config = runpy.run_path(str(CONFIGS / f"{stage}.py"))["get_config"](variant)
    assert params.count(tasks.create(config).shapes()) == COUNTS[stage, variant]


FITS = {"language": "t5", "exact_gelu": True, "instruct": False, "has_tower": False}


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({}, {"language": "opt"}, "was trained with a language model 't5', config.llm is 'opt'"),
        ({}, {"exact_gelu": False}, "add --config.llm_activation=gelu"),
        ({"instruct": True}, {}, "reads instructions: add --config.instruct=True"),
        ({"has_tower": True}, {}, "holds a fine-tuned image encoder.* add --config.vision=lavis:x.pth"),
        ({"has_tower": True}, {"vision": "lavis:x.pth"}, None),
        ({"language": ""}, {}, None),
        ({}, {"language": ""}, None),
        ({"language": "llama"}, {"language": "qwen2"}, None),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(theirs, ours, message):
    opened = trained.Source(None, None, **(FITS | theirs))
    asked = {"language": "t5", "exact_gelu": True, "instruct": False, "vision": "lavis:eva_vit_g.pth"} | ours
    if message is None:
        trained.check_fit("lavis:x.pth", opened, **asked)
        return
    with pytest.raises(ValueError, match=message):
        trained.check_fit("lavis:x.pth", opened, **asked)


def test_an_activation_is_for_t5_alone(folder, own_cache):
    with pytest.raises(ValueError, match="llm_activation = 'gelu' with a language model 'llama': expected ''"):
        tasks.create(recipe("stage2", folder, llm_activation="gelu"))


# With torch.


def lavis_file(file, config, tree, projection):
    """A checkpoint as LAVIS writes it: frozen parts missing, a buffer, what is tied twice, the rest under "model".

    The names are our own table's; that it is right is for tests/parity to show, with the original's own files.
    """
    import torch

    task = tasks.create(config)
    table = params.relevant(qformer.table(qformer.lavis(projection)), tree)
    mapped = mapping.resolve(tree, table, lambda path: qformer.layers_of(task.blip2.qformer, path))
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in mapping.export(tree, mapped)}
    tensors["Qformer.bert.embeddings.position_ids"] = torch.arange(16)[None]
    if "temp" in tensors:  # Stage 1.
        tensors["Qformer.cls.predictions.decoder.weight"] = tensors["Qformer.bert.embeddings.word_embeddings.weight"]
    torch.save({"model": tensors, "epoch": 9}, file)


@pytest.mark.torch
def test_a_file_of_lavis(checkpoint, tmp_path, capfd):
    config, tree, _ = checkpoint
    lavis_file(tmp_path / "blip2.pth", config, tree, "llm_proj" if config.task == "stage2" else "")
    convert.import_checkpoint(changed(config, init=f"lavis:{tmp_path / 'blip2.pth'}"), tmp_path / "back")
    chex.assert_trees_all_equal(store.load_trainable(tmp_path / "back"), tree)
    said = capfd.readouterr().err
    assert "1 left aside (a buffer)" in said
    assert "NOT EXPECTED" not in said


@pytest.mark.torch
def test_files_that_are_not_opened(folder, own_cache, tmp_path):
    import pickle

    import torch

    config = recipe("stage1", folder)

    class Evil:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "ran",))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(ValueError, match=r"evil\.pth holds more than tensors"):
        convert.import_checkpoint(changed(config, init=f"lavis:{tmp_path / 'evil.pth'}"), tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    torch.save({"model": {"weight": torch.ones(200, 200)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth is not a BLIP-2 of LAVIS"):
        convert.import_checkpoint(changed(config, init=f"lavis:{tmp_path / 'other.pth'}"), tmp_path / "out")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:50_000])
    with pytest.raises(ValueError, match=r"cut\.pth is truncated"):
        convert.import_checkpoint(changed(config, init=f"lavis:{tmp_path / 'cut.pth'}"), tmp_path / "out")


@pytest.mark.torch
def test_transformers_gives_the_same_outputs(checkpoint, exported, rng):
    import torch
    import transformers

    config, tree, _ = checkpoint
    task = tasks.create(config)
    pictures = rng.integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    embeds = task.encode(pictures)
    processor = transformers.AutoProcessor.from_pretrained(exported)
    if config.task == "stage1":
        model = transformers.Blip2ForImageTextRetrieval.from_pretrained(exported).eval()
        texts = ["a red square", "blue circle of a"]
        ids, mask = task.caption_tokenizer(texts, 6)
        encoded = processor(images=list(pictures), text=texts, padding=True, return_tensors="pt")
        np.testing.assert_array_equal(np.asarray(encoded["input_ids"]), ids)
        bound = task.model.bind({"params": tree})
        match = bound.match(bound.project_image(embeds), ids, mask)
        with torch.no_grad():
            theirs = model(use_image_text_matching_head=True, **encoded).logits_per_image
        np.testing.assert_allclose(np.asarray(match), theirs.numpy(), atol=1e-4)
        return
    if config.instruct:
        model = transformers.InstructBlipForConditionalGeneration.from_pretrained(exported).eval()
    else:
        model = transformers.Blip2ForConditionalGeneration.from_pretrained(exported).eval()
    encoded = processor(images=list(pictures), text=["a red", "a red"], return_tensors="pt")
    with torch.no_grad():
        theirs = model(**encoded).logits.numpy()
    instruction = ()
    if config.instruct:
        instruction = (encoded["qformer_input_ids"].numpy(), encoded["qformer_attention_mask"].numpy())
    soft_prompt = task.model.apply({"params": tree}, embeds, *instruction)
    bound = task.language_model.bind({"params": task.frozen["language"]})
    ids = np.asarray(encoded["input_ids"])[:, config.model.queries :]
    row = np.concatenate([soft_prompt, bound.embed(ids)], axis=1)
    length = row.shape[1]
    hidden, _ = bound(row, np.broadcast_to(np.arange(length), (2, length)), causal_mask(length))
    ours = np.asarray(hidden @ bound.head().T)
    np.testing.assert_allclose(ours, theirs[..., : ours.shape[-1]], atol=1e-4 * np.abs(theirs).max())


@pytest.mark.torch
@pytest.mark.parametrize("name", ["OPT", "Flan-T5", "Llama"])
def test_exports_around_other_language_models(name, folder, own_cache, tmp_path, rng):
    """Heads of their own, rows that no token has (one of them becomes the image token), an encoder-decoder."""
    import torch
    import transformers

    kind, config_class, sizes = LANGUAGE[name]
    ends = {"eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False}
    saved(kind, config_class, sizes | ends | {"vocab_size": 320}, tmp_path / "llm")
    config = recipe("stage2", folder, llm=f"hf:{tmp_path / 'llm'}", **{"data.begin": ""})
    shutil.copy(folder / "llama" / "tokenizer.json", tmp_path / "llm")
    tree, task = random_tree(config), tasks.create(config)
    store.save_alone(tmp_path / "ours", tree, json.loads(config.to_json()), task.frozen_identity())
    convert.export_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs")
    exported = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert exported["text_config"]["vocab_size"] == 320
    assert not exported["text_config"]["tie_word_embeddings"]

    pictures = rng.integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    soft_prompt = task.soft_prompt(tree, task.encode(pictures))
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "theirs")
    encoded = processor(images=list(pictures), text=["a red", "a red"], return_tensors="pt")
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    bound = task.language_model.bind({"params": task.frozen["language"]})
    ids = np.asarray(encoded["input_ids"])[:, config.model.queries :]
    row = np.concatenate([soft_prompt, bound.embed(ids)], axis=1)
    if name == "Flan-T5":
        answer = rng.integers(3, 90, (2, 5))
        hidden, _ = bound.decode(bound.encode(row, np.ones(row.shape[:2], bool)), bound.embed(answer))
        encoded["decoder_input_ids"] = torch.tensor(answer)
    else:
        positions = np.broadcast_to(np.arange(row.shape[1]), row.shape[:2])
        hidden, _ = bound(row, positions, causal_mask(row.shape[1]))
    with torch.no_grad():
        theirs = model(**encoded).logits.numpy()
    np.testing.assert_allclose(np.asarray(hidden @ bound.head().T), theirs, atol=1e-4 * np.abs(theirs).max())
