"""CapFilt: what is written and kept, by whom it was judged, on any mesh, and interrupted."""

import collections
import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest

from blip2_jax import bootstrapping, capfilt, params, tasks
from blip2_jax.bootstrapping import CapFilt, Settings
from blip2_jax.data.records import BadRecord
from blip2_jax.data.sources import open_source
from blip2_jax.data.text import clean_caption
from blip2_jax.decoding import Draws, GenerationConfig
from blip2_jax.parallel.mesh import make_mesh
from tests import tiny

pytestmark = pytest.mark.usefixtures("own_cache")
GENERATION = GenerationConfig(6, min_new_tokens=1, temperature=1.0, top_p=0.9)
ALL = Settings(captions=3, generation=GENERATION, seed=7, rule="sum", threshold=-1e9, keep=0)


def mesh_of(text, devices):
    return make_mesh(text, jax.devices()[:devices])


def read(folder):
    source = open_source(f"arrayrecord:{folder}/*.arrayrecord")
    return [source[index] for index in range(len(source))]


@pytest.fixture(scope="module")
def source(folder):
    tiny.recipe("stage1", folder)  # Makes the pictures.
    return f"jsonl:{folder / 'pictures' / 'pictures.jsonl'}"


@pytest.fixture(scope="module", autouse=True)
def opened_once():
    """What a checkpoint has compiled on a mesh serves all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capfilt, "open_trained", functools.cache(bootstrapping.open_trained))
        yield


@pytest.fixture(scope="module", params=["stage1", "stage2"])
def corpus(request, source, stage1, tmp_path_factory):
    """18 images with all captions by one captioner, made on one device."""
    output, captioner = tmp_path_factory.mktemp(request.param) / "corpus", request.getfixturevalue(request.param)
    checkpoints = {"filter": str(stage1), "captioner": str(captioner)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capfilt, "RECORDS_IN_SHARD", 7)
        facts = capfilt.build(source, output, checkpoints, ALL, 4, mesh_of("data=1", 1))
    return output, facts, checkpoints


def test_every_caption_says_whence_it_comes(corpus, source):
    output, facts, checkpoints = corpus
    records, originals = read(output), open_source(source)
    digest = params.sha256(tasks.load_trained(checkpoints["captioner"])[1])
    assert facts["captioner"]["sha256"] == digest
    assert json.loads((output / "corpus.json").read_text()) == facts
    assert [record["key"] for record in records] == [
        original["key"] for original in map(originals.__getitem__, range(18))
    ]
    written, kept = set(), {"original": 0, "synthetic": 0}
    for index, record in enumerate(records):
        original = originals[index]
        assert {name: record[name] for name in original if name != "captions"} == {
            name: value for name, value in original.items() if name != "captions"
        }
        assert len(record["captions"]) == len(record["provenance"]) <= 4
        assert len(set(map(clean_caption, record["captions"]))) == len(record["captions"])
        values = [provenance["scores"]["sum"] for provenance in record["provenance"]]
        assert values == sorted(values, reverse=True)
        for text, provenance in zip(record["captions"], record["provenance"], strict=True):
            kept[provenance["from"]] += 1
            if provenance["from"] == "original":
                assert [text] == original["captions"]
            else:
                assert (provenance["checkpoint"], provenance["seed"]) == (digest, 7)
                written.add(text)
    assert kept["original"] == 18
    assert kept["synthetic"] > 18
    assert len(written) > 5
    assert {name: facts["counts"][f"{name}_kept"] for name in kept} == kept
    assert facts["counts"] == {"images_read": 18, "images_kept": 18} | {f"{name}_kept": n for name, n in kept.items()}


def test_a_caption_is_a_function_of_seed_number_and_image(corpus, source):
    """Image 11 alone, its second caption."""
    output, _, checkpoints = corpus
    task, trainable = tasks.load_trained(checkpoints["captioner"])
    pictures = task.pictures(source, training=False)
    image = pictures.view.render(pictures.source[11], 11, 0)
    draws = Draws(jax.random.key(7), np.asarray([11], np.uint32))
    both = dataclasses.replace(GENERATION, num_return_sequences=2)
    ((_, text),) = task.captions(trainable, task.encode(image[None]), both, draws)
    record = read(output)[11]
    by_number = {p.get("number"): caption for caption, p in zip(record["captions"], record["provenance"], strict=True)}
    expected = by_number.get(1)
    if expected is None:  # It was there already, as the original or as the first.
        assert clean_caption(text) in {"", *map(clean_caption, record["captions"])}
    else:
        assert text.strip() == expected


def test_the_mesh_changes_nothing(corpus, source, tmp_path):
    output, facts, checkpoints = corpus
    # One of them for each captioner: a row on each device, and all axes.
    mesh = "data=8" if facts["captioner"]["stage"] == "stage1" else "data=2,fsdp=2,tensor=2"
    other = capfilt.build(source, tmp_path / "corpus", checkpoints, ALL, 8, mesh_of(mesh, 8))
    assert other["counts"] == facts["counts"]
    for one, many in zip(read(output), read(tmp_path / "corpus"), strict=True):
        scores = [dict(zip(record["captions"], record["provenance"], strict=True)) for record in (one, many)]
        assert scores[0].keys() == scores[1].keys()
        for text, provenance in scores[0].items():
            found = scores[1][text]
            assert found | {"scores": None} == provenance | {"scores": None}
            for rule, value in provenance["scores"].items():
                assert found["scores"][rule] == pytest.approx(value, abs=2e-4), rule


def test_scores_are_those_of_the_model_and_decide(source, stage1, tmp_path):
    """Image by image, caption by caption, against what the filter says of a pair."""
    task, trainable = tasks.load_trained(stage1)
    pictures, expected = task.pictures(source, training=False), []
    for index in range(len(pictures.source)):
        embeds = task.encode(pictures.view.render(pictures.source[index], index, 0)[None])
        ids, mask = task.caption_tokenizer([clean_caption(pictures.source[index]["captions"][0])], 6)
        seen, text = task.image_features(trainable, embeds), task.text_features(trainable, ids, mask)
        itc = float((seen[0] @ text[0]).max() / trainable["temperature"])
        logits = task.match_logits(trainable, embeds, ids, mask)[0]
        odds = float(logits[1] - logits[0])
        expected.append({"itc": itc, "itm": 1 / (1 + np.exp(-odds)), "sum": odds + itc})
    for rule in bootstrapping.RULES:
        threshold = float(np.median([scores[rule] for scores in expected]))
        settings = Settings(0, GENERATION, 0, rule, threshold, 1)
        facts = capfilt.build(source, tmp_path / rule, {"filter": str(stage1)}, settings, 4, mesh_of("data=1", 1))
        records = {record["key"]: record for record in read(tmp_path / rule)}
        for index, scores in enumerate(expected):
            key = pictures.source[index]["key"]
            if abs(scores[rule] - threshold) > 1e-4:
                assert (key in records) == (scores[rule] > threshold), rule
            if key in records:
                assert records[key]["provenance"][0]["scores"] == pytest.approx(scores, abs=2e-4)
        counts = facts["counts"]
        assert counts["images_kept"] == len(records) == counts["original_kept"]
        assert counts["images_dropped"] == 18 - len(records) == counts["original_dropped"] > 0


def test_the_best_are_kept(corpus, source, tmp_path):
    output, _, checkpoints = corpus
    best = Settings(**{**vars(ALL), "keep": 2})
    capfilt.build(source, tmp_path / "best", checkpoints, best, 4, mesh_of("data=1", 1))
    for every, two in zip(read(output), read(tmp_path / "best"), strict=True):
        assert two["captions"] == every["captions"][:2]


def test_a_second_time_captions_keep_their_origin(corpus, stage1, tmp_path):
    output, _, _ = corpus
    again = Settings(0, GENERATION, 0, "sum", -1e9, 0)
    name = f"arrayrecord:{output}/*.arrayrecord"
    capfilt.build(name, tmp_path / "again", {"filter": str(stage1)}, again, 4, mesh_of("data=1", 1))
    origin = lambda record: [p | {"scores": None} for p in record["provenance"]]
    for first, second in zip(read(output), read(tmp_path / "again"), strict=True):
        assert sorted(map(str, origin(first))) == sorted(map(str, origin(second)))


class Stop(Exception):
    pass


def test_a_stopped_run_goes_on_with_the_next_shard(corpus, source, tmp_path, monkeypatch):
    output, facts, checkpoints = corpus
    monkeypatch.setattr(capfilt, "RECORDS_IN_SHARD", 7)
    shards, write = [], capfilt.write_shard

    def stops_in_the_third(file, records):
        shards.append(file.name)
        if len(shards) == 3:
            next(iter(records))
            raise Stop
        return write(file, records)

    build = lambda: capfilt.build(source, tmp_path / "c", checkpoints, ALL, 4, mesh_of("data=1", 1))
    with monkeypatch.context() as patch:
        patch.setattr(capfilt, "write_shard", stops_in_the_third)
        with pytest.raises(Stop):
            build()
    assert "counts" not in json.loads((tmp_path / "c" / "corpus.json").read_text())
    done = {file: file.stat().st_mtime_ns for file in (tmp_path / "c").glob("*.arrayrecord")}
    assert len(done) == 2
    assert build() == facts
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert read(tmp_path / "c") == read(output)


def test_a_folder_belongs_to_one_corpus(corpus, source):
    output, _, checkpoints = corpus
    other = Settings(**{**vars(ALL), "keep": 3})
    before = (output / "corpus.json").read_text()
    with pytest.raises(ValueError, match=r"holds another corpus:\n  settings/keep: 0 there, 3 asked for\n"):
        capfilt.build(source, output, checkpoints, other, 4, mesh_of("data=1", 1))
    assert (output / "corpus.json").read_text() == before


class Damaged:
    """A source with an image that cannot be read, one without captions, and one with an empty caption."""

    identity = "damaged"

    def __init__(self, source):
        self._source = source

    def __len__(self):
        return 5

    def __getitem__(self, index):
        record = self._source[index]
        if index == 1:
            raise BadRecord("truncated", record["key"], "ends early")
        captions = {2: [], 3: [" ."]}.get(index, record["captions"])
        return record | {"captions": captions}


def test_what_cannot_be_used_is_counted(source, stage1):
    judge = capfilt.open_trained(str(stage1), mesh := mesh_of("data=1", 1))
    counts = collections.Counter()
    settings = Settings(0, GENERATION, 0, "itc", -1e9, 0)
    records = list(CapFilt(None, judge, settings, 4, mesh).records(Damaged(open_source(source)), range(5), counts))
    assert [len(record["captions"]) for record in records] == [1, 1]
    expected = {"images_read": 5, "images_kept": 2, "images_dropped": 2, "original_kept": 2, "rejected_truncated": 1}
    assert counts == expected


def test_no_more_is_read_than_the_next_batch(source):
    known, asked = open_source(source), []

    class Endless(Damaged):
        def __getitem__(self, index):
            asked.append(index)
            return known[0]

    batches = bootstrapping._read_ahead(Endless(known), range(10**9), {8}, 4)
    assert [looked[0] for looked in next(batches)] == [0, 1, 2, 3]
    assert [looked[0] for looked in next(batches)] == [4, 5, 6, 7]
    assert len(asked) <= 12
    batches.close()


def test_the_command_tells_what_it_did(source, stage1, tmp_path, capsys):
    arguments = (
        f"--source={source} --output={tmp_path / 'c'} --filter={stage1} --captions=0 --threshold=0 --batch_size=8"
    )
    capfilt.main(arguments.split())
    assert capsys.readouterr().out.splitlines() == ["images kept: 18", "images read: 18", "original kept: 18"]
    assert json.loads((tmp_path / "c" / "corpus.json").read_text())["settings"]["rule"] == "itm"


def test_errors_say_what_is_missing(source, stage1, stage2, tmp_path):
    common = [f"--source={source}", f"--output={tmp_path / 'c'}", "--batch_size=8"]
    for arguments, message in (
        ([f"--filter={stage2}", "--captions=0"], "the filter is a checkpoint of stage2; only stage 1 can score"),
        ([f"--filter={stage1}"], r"10 captions an image: name what writes them \(--captioner\)"),
        ([f"--filter={stage1}", "--captions=0", "--rule=itc"], "--rule itc needs a finite --threshold"),
        ([f"--filter={stage1}", f"--captioner={stage1}", "--temperature=0"], "--temperature 0 would draw the same"),
        ([f"--filter={stage1}", f"--captioner={stage1}", "--top_p=0"], r"top_p = 0\.0: expected above 0"),
        ([f"--filter={stage1}", "--captions=0", "--keep=-1"], "--keep = -1: expected at least 0"),
        ([f"--filter={stage1}", "--captions=0", "--batch_size=6"], "batch_size 6 does not divide"),
        ([f"--filter={tmp_path}", "--captions=0"], "holds no checkpoint"),
    ):
        with pytest.raises(SystemExit) as caught:
            capfilt.main([*common, *arguments])
        assert re.search(f"^error: .*{message}", str(caught.value)), str(caught.value)
    assert not (tmp_path / "c").exists()
