"""Any source to a corpus: what is kept, what is left out, what is said of it, and all ways to stop and go on."""

import dataclasses
import fcntl
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import msgpack
import numpy as np
import pytest
from PIL import Image

from blip2_jax import files
from blip2_jax.data import __main__ as command
from blip2_jax.data import prepare, shards
from blip2_jax.data.corpus import Corpus, TooManyRejects
from blip2_jax.data.filters import Filters
from blip2_jax.data.sources import open_source
from blip2_jax.data.workers import Report


def encode(size, kind="JPEG", seed=0):
    """A smooth pattern."""
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(stream, kind, quality=95)
    return stream.getvalue()


def a_record(number):
    """Images of (20 + number) x 40 pixels, every third a PNG; one caption more with every record, up to three."""
    image = encode((20 + number, 40), "PNG" if number % 3 == 0 else "JPEG", number)
    captions = [f"caption {word} of {number}" for word in ("one", "two", "three")[: number % 3 + 1]]
    return {"key": f"r{number}", "image": image, "captions": captions, "category": "noise"}


def source_of(records, folder):
    shards.write_shard(folder / "source.arrayrecord", map(msgpack.packb, records))
    return f"arrayrecord:{folder}/source.arrayrecord"


def larger(record):
    return record | {"image": encode((600, 500), "BMP")}


@pytest.fixture
def records():
    return [a_record(number) for number in range(10)]


@pytest.fixture
def source(records, tmp_path):
    return source_of(records, tmp_path / "in")


def in_this_process(work, numbers):
    for number in numbers:
        work(number, lambda steps: None)
        yield Report(0, number)


def write(source, folder, count=2, megabytes=256.0, max_rejected=0.1, engine=in_this_process, **settings):
    plan, size = prepare.make_plan(source, prepare.Settings(**settings), count, megabytes)
    corpus = Corpus(plan, folder, size, max_rejected)
    return corpus, corpus.write(engine)


def read(corpus):
    written = open_source(corpus.source)
    return [written[index] for index in range(len(written))]


def contents(folder):
    """What must not depend on how the corpus was written; the date in corpus.json may."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "corpus.json"}


def times(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("0*")}


# What is written.


def test_records_arrive_whole_and_in_order(source, records, tmp_path):
    corpus, _ = write(source, tmp_path / "out", 3)
    assert read(corpus) == records
    assert sorted(file.name for file in corpus.folder.glob("*.arrayrecord")) == [
        f"0000{number}-of-00003.arrayrecord" for number in range(3)
    ]


def test_statistics_are_right(source, records, tmp_path):
    corpus, found = write(source, tmp_path / "out")
    said = json.loads((corpus.folder / "statistics.json").read_text())
    assert (said["records"], said["captions"], said["questions"], said["resized"]) == (10, 4 * 1 + 3 * 2 + 3 * 3, 0, 0)
    assert said["image_bytes"] == sum(len(record["image"]) for record in records)
    assert said["file_bytes"] == sum(file.stat().st_size for file in corpus.folder.glob("*.arrayrecord"))
    assert said["formats"] == {"JPEG": 6, "PNG": 4}
    quantiles = said["quantiles"]
    assert [quantiles["shorter_side"][name] for name in ("min", "median", "max")] == [20, 24, 29]
    assert set(quantiles["longer_side"].values()) == {40}
    assert (quantiles["aspect"]["min"], quantiles["aspect"]["max"]) == (1.38, 2.0)
    assert set(quantiles["words_a_caption"].values()) == {4}
    assert dict(said["most_frequent_words"]) == dict(found.words)
    assert found.words["caption"] == found.words["of"] == 19
    assert found.words["one"] == 10
    assert said["rejected"] == {}


def test_provenance(source, tmp_path):
    corpus, _ = write(source, tmp_path / "out", shuffle=3)
    said = json.loads((corpus.folder / "corpus.json").read_text())
    assert said["finished"] is True
    assert said["plan"]["source"] == source
    assert said["plan"]["identity"] == open_source(source).identity
    assert said["plan"]["settings"] == {"check": True, "filters": None, "resize": 0, "shuffle": 3}
    assert (said["records"], said["captions"]) == (10, 19)
    assert said["identity"] == open_source(corpus.source).identity
    assert said["versions"]["Pillow"] == Image.__version__
    with Image.open(corpus.folder / "contact_sheet.jpg") as sheet:
        assert sheet.format == "JPEG"


def test_a_random_order_is_of_all_records_and_of_its_seed(source, records, tmp_path):
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        corpus, _ = write(source, tmp_path / name, shuffle=seed)
        orders.append([record["key"] for record in read(corpus)])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(record["key"] for record in records) != orders[0]


def test_only_larger_images_are_made_smaller(source, records, tmp_path):
    corpus, found = write(source, tmp_path / "out", resize=24)
    resized = 0
    for before, after in zip(records, read(corpus), strict=True):
        with Image.open(io.BytesIO(before["image"])) as large, Image.open(io.BytesIO(after["image"])) as small:
            if large.width <= 24:
                assert after == before
                continue
            resized += 1
            assert small.format == "JPEG"
            assert small.size == (24, round(40 * 24 / large.width))
            expected = np.asarray(large.convert("RGB").resize(small.size, Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(np.asarray(small).astype(int) - expected).mean() < 4
    assert found.resized == resized == 5
    assert max(found.shorter_side) == 24


def test_the_size_of_shards_decides_their_number(source, tmp_path):
    size = sum(len(msgpack.packb(a_record(number))) for number in range(10))
    plan, estimate = prepare.make_plan(source, prepare.Settings(), None, size / 1e6 / 3.5)
    assert plan.shards == 4
    assert estimate == pytest.approx(size)
    assert prepare.make_plan(source, prepare.Settings(), None, 1000)[0].shards == 1
    assert prepare.make_plan(source, prepare.Settings(), None, 1e-6)[0].shards == 10


def test_questions_need_no_captions(tmp_path):
    record = {"key": "q", "image": encode((30, 30)), "question": "what?", "answers": ["noise"], "weights": [1.0]}
    corpus, found = write(source_of([record], tmp_path / "in"), tmp_path / "out", 1)
    assert read(corpus) == [record]
    assert (found.questions, found.captions) == (1, 0)


# What is left out.


@pytest.fixture
def damaged(records, tmp_path):
    """Ten records, of which 2 and 5 are no images and 7 ends early."""
    for number in (2, 5):
        records[number]["image"] = b"no image at all"
    records[7]["image"] = records[7]["image"][:-200]
    return source_of(records, tmp_path / "in")


def test_bad_records_are_left_out_counted_and_listed(damaged, tmp_path):
    corpus, found = write(damaged, tmp_path / "out", 3, max_rejected=0.3)
    assert [record["key"] for record in read(corpus)] == ["r0", "r1", "r3", "r4", "r6", "r8", "r9"]
    lines = [json.loads(line) for line in (corpus.folder / "rejects.jsonl").read_text().splitlines()]
    assert [(line["key"], line["source"]) for line in lines] == [(f"r{number}", damaged) for number in (2, 5, 7)]
    assert found.records == 7
    assert [line["reason"] for line in lines] == ["unreadable", "unreadable", "truncated"]
    assert found.rejected == {"unreadable": 2, "truncated": 1}
    assert all(line["detail"] for line in lines)


def test_unchecked_images_are_known_by_their_headers_alone(damaged, tmp_path):
    corpus, found = write(damaged, tmp_path / "out", max_rejected=0.2, check=False)
    assert [record["key"] for record in read(corpus)] == ["r0", "r1", "r3", "r4", "r6", "r7", "r8", "r9"]
    assert found.rejected == {"unreadable": 2}


def test_too_many_bad_records_are_an_error_and_allowing_more_goes_on(damaged, tmp_path):
    folder, begun = tmp_path / "out", []

    def watched(work, numbers):
        for number in numbers:
            begun.append(number)
            yield from in_this_process(work, [number])

    with pytest.raises(TooManyRejects, match=r"2 or more of 10 records .* cannot be used \(unreadable 2\).*0\.15"):
        write(damaged, folder, 5, max_rejected=0.15, engine=watched)
    assert begun == [0, 1, 2]  # The second one is in shard 2, and then it was certain.
    assert len((folder / "rejects.jsonl").read_text().splitlines()) == 2
    known = times(folder)
    with pytest.raises(TooManyRejects, match="2 or more"):  # Without writing anything.
        write(damaged, folder, 5, max_rejected=0.15, engine=watched)
    _, found = write(damaged, folder, 5, max_rejected=0.3, engine=watched)
    assert begun == [0, 1, 2, 3, 4]
    assert known.items() <= times(folder).items()
    assert found.records == 7


def test_nothing_usable_is_an_error(records, tmp_path):
    source = source_of([record | {"image": b""} for record in records], tmp_path / "in")
    with pytest.raises(
        TooManyRejects, match=r"none of the 10 records .* is left \(missing 10\); .*rejects.jsonl lists them"
    ):
        write(source, tmp_path / "out", max_rejected=1.0)


def test_filters_keep_what_passes_and_are_no_sign_of_a_broken_source(records, tmp_path):
    records[0]["captions"] = ["кот", "a cat"]
    records[1]["captions"] = ["один кот"]
    records[3]["image"] = encode((200, 20))
    records[4]["image"] = encode((30, 12))
    chosen = Filters(min_side=16, max_aspect=3, min_words=2, scripts=("latin",))
    source = source_of(records, tmp_path / "in")
    corpus, found = write(source, tmp_path / "out", max_rejected=0.0, filters=chosen)
    assert found.rejected == {"script": 1, "aspect": 1, "too_small": 1}
    kept = {record["key"]: record["captions"] for record in read(corpus)}
    assert kept["r0"] == ["a cat"]
    assert kept.keys() == {f"r{number}" for number in range(10)} - {"r1", "r3", "r4"}
    with pytest.raises(ValueError, match=r"plan:\n  settings/filters/min_side: 16 there, 17 asked for\nRepeat"):
        write(source, tmp_path / "out", filters=dataclasses.replace(chosen, min_side=17))
    with pytest.raises(ValueError, match=r"settings/filters: \{.*\} there, None asked for"):
        write(source, tmp_path / "out")
    write(source, tmp_path / "out", max_rejected=0.0, filters=chosen)


def test_a_broken_disk_is_no_bad_record(source, tmp_path, monkeypatch):
    def fail(self, index):
        raise OSError("input/output error")

    monkeypatch.setattr(type(open_source(source)), "__getitem__", fail)
    with pytest.raises(OSError, match="input/output error"):
        write(source, tmp_path / "out")


# Stopping and going on.


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """The name of a source of 48 records."""
    made = (a_record(number % 10) | {"key": f"r{number}"} for number in range(48))
    return source_of(made, tmp_path_factory.mktemp("long"))


def start(source, folder):
    """The command, when it has written two of 24 shards; it needs two seconds more."""
    arguments = ["--source", source, "--output", str(folder), "--shards", "24", "--shuffle", "--workers", "1"]
    command = [sys.executable, "-m", "tests.slowly", "prepare", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=pathlib.Path(__file__).parents[2])
    while len(list(folder.glob("0*.json"))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return process


def partial_files(folder):
    return list(folder.glob("*.partial-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_command_leaves_nothing_half_written(long, tmp_path, number):
    process = start(long, tmp_path / "out")
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.endswith("stopped; the same command goes on from here\n")
    assert partial_files(tmp_path / "out") == []
    assert 2 <= len(list((tmp_path / "out").glob("0*.json"))) < 24


def test_a_killed_command_goes_on_and_ends_with_the_same_files(long, tmp_path):
    folder = tmp_path / "out"
    process = start(long, folder)
    process.kill()
    process.communicate()
    # Workers that have lost the process which started them stop at the next record.
    for _ in range(600):
        if not partial_files(folder):
            break
        time.sleep(0.05)
    assert partial_files(folder) == []
    done = {name: time for name, time in times(folder).items() if name.endswith(".json")}
    assert 2 <= len(done) < 24
    (folder / "00023-of-00024.arrayrecord.partial-1").write_bytes(b"of a machine that lost its power")
    write(long, folder, 24, shuffle=0)
    assert done.items() <= times(folder).items()
    whole, _ = write(long, tmp_path / "whole" / "out", 24, shuffle=0)
    assert contents(folder) == contents(whole.folder)


def test_a_shard_without_its_facts_or_of_another_size_is_written_again(source, tmp_path):
    corpus, _ = write(source, tmp_path / "out", 4)
    whole = contents(corpus.folder)
    shard = lambda number: shards.shard_file(corpus.folder, number, 4)
    shard(0).with_suffix(".json").unlink()
    shard(1).write_bytes(shard(1).read_bytes()[:-1])
    shard(2).unlink()
    before = times(corpus.folder)
    write(source, corpus.folder, 4)
    assert contents(corpus.folder) == whole
    assert {name for name, time in times(corpus.folder).items() if before.get(name) == time} == {
        "00003-of-00004.arrayrecord",
        "00003-of-00004.json",
    }


def test_a_finished_corpus_needs_no_work(source, tmp_path, capfd):
    corpus, _ = write(source, tmp_path / "out", 4)
    before = times(corpus.folder)
    write(source, corpus.folder, 4)
    assert times(corpus.folder) == before
    assert "4 are there" in capfd.readouterr().err


# Errors.


def test_another_plan_in_the_folder_is_an_error(source, records, tmp_path):
    corpus, _ = write(source, tmp_path / "out", 4)
    before = contents(corpus.folder)
    with pytest.raises(
        ValueError, match=r"plan:\n  settings/resize: 0 there, 24 asked for\n  shards: 4 there, 3 asked for\nRepeat"
    ):
        write(source, corpus.folder, 3, resize=24)
    other = source_of([*records[:8], larger(records[9])], tmp_path / "other")
    with pytest.raises(ValueError, match=r"identity: '\w+' there, '\w+' asked for\n  length: 10 there, 9 asked for"):
        write(other, corpus.folder, 4)
    assert contents(corpus.folder) == before


def test_other_contents_of_the_folder_are_an_error(source, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"holds other files \(thesis.tex\)"):
        write(source, tmp_path / "other")
    (tmp_path / "other" / "corpus.json").write_text('["not ours"]')
    with pytest.raises(FileExistsError, match="is not a plan of this command"):
        write(source, tmp_path / "other")
    with pytest.raises(NotADirectoryError, match="is a file"):
        write(source, tmp_path / "other" / "thesis.tex")


def test_one_command_at_a_time(source, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(FileExistsError, match="another command is at work"):
        write(source, folder)
    os.close(held)
    write(source, folder)


def test_a_source_that_changes_under_way_is_an_error(source, records, tmp_path):
    plan, size = prepare.make_plan(source, prepare.Settings(), 2, 1.0)
    source_of([larger(records[0]), *records[1:]], tmp_path / "in")
    with pytest.raises(ValueError, match="has changed since"):
        Corpus(plan, tmp_path / "out", size, 0.1).write(in_this_process)


def test_a_full_disk_is_known_before(source, tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"no room for the corpus.*another disk"):
        write(source, tmp_path / "out")


def test_too_few_records_for_the_shards(source, tmp_path):
    with pytest.raises(ValueError, match="has 10 records: expected from 1 to as many shards, found 11"):
        write(source, tmp_path / "out", 11)
    empty = source_of([], tmp_path / "empty")
    with pytest.raises(ValueError, match="holds no record"):
        write(empty, tmp_path / "out")


# The command.


@pytest.fixture
def signals():
    """Keep the handlers that the command replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def test_the_command_prints_what_it_made(source, tmp_path, capfd, signals):
    command.main(
        ["prepare", "--source", source, "--output", str(tmp_path / "out [1]"), "--workers", "2", "--shards", "3"]
    )
    printed = capfd.readouterr().out
    assert re.search(r"^records +10$", printed, re.MULTILINE)
    named = re.search(r"--config\.data\.train='(.*)'", printed)[1]
    assert len(open_source(named)) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--source nowhere:x --output {out}", "error: data source 'nowhere:x'"),
        ("--source arrayrecord:{out}/* --output {out}", "error: .*no file matches"),
        ("--source {source} --output {out} --filters min_side=9 max_sid=9", "error: .*max_sid: no such filter"),
        ("--source {source} --output {out} -- --region=x", "error: --region=x behind --: only --engine=beam"),
    ],
)
def test_errors_are_one_line(arguments, message, source, tmp_path, signals):
    filled = arguments.format(source=source, out=tmp_path / "out").split()
    with pytest.raises(SystemExit, match=message):
        command.main(["prepare", *filled])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flag", ["--shards=0", "--shards=x", "--max_rejected=2", "--shard_megabytes=-1", "--resize=0", "--filters=x"]
)
def test_flags_say_what_they_expect(flag, tmp_path, capsys, signals):
    with pytest.raises(SystemExit) as ended:
        command.main(["prepare", "--source=nano:train", f"--output={tmp_path}", flag])
    assert ended.value.code == 2
    assert "expected " in capsys.readouterr().err


def test_there_are_two_commands(signals):
    for arguments in ([], ["prepair"]):
        with pytest.raises(SystemExit, match=r"(?s)data prepare.*data preview"):
            command.main(arguments)
