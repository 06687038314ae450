"""The page of the first batches: it shows what trains, and needs no weights."""

import base64
import html
import io
import itertools
import pathlib
import re
import signal

import numpy as np
import pytest
from PIL import Image

from blip2_jax import tasks
from blip2_jax.checkpoints import frozen
from blip2_jax.data import __main__ as command
from blip2_jax.data import preview
from blip2_jax.data.pipeline import training_batches
from blip2_jax.data.records import BadRecord
from blip2_jax.data.sources import open_source
from blip2_jax.tasks import common
from tests import tiny

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def no_weights(monkeypatch):
    """Weights are not to be read."""
    for name in ("load_vision", "load_language_model"):
        monkeypatch.setattr(frozen, name, lambda *arguments, **more: pytest.fail("weights were read"))


def first_batches(config, count):
    task = tasks.create(config)
    parts = task.training_parts()
    batches = training_batches(parts, task.batches.collate, config.batch_size, config.seed)
    return task, [delivery.batch for delivery in itertools.islice(batches, count)]


def texts(line, *kinds):
    return [token.text for token in line.tokens if token.kind in kinds]


def test_pixels_and_tokens_are_those_of_the_run(folder, no_weights):
    config = tiny.recipe("stage1", folder, **{"data.feature_views": 0, "data.flip": True})
    _, batches = first_batches(config, 2)
    _, shown = preview.look(config, 2, 128)
    for batch, page in zip(batches, shown, strict=True):
        np.testing.assert_array_equal(np.stack([row.image for row in page.rows]), batch["image"])
        for row, ids, mask, image_id in zip(
            page.rows, batch["text_ids"], batch["text_mask"], batch["image_id"], strict=True
        ):
            tokens = row.lines[0].tokens
            assert [int(token.note) for token in tokens] == ids.tolist()
            assert [token.kind != "padding" for token in tokens] == mask.tolist()
            assert row.ids["image_id"] == f"{image_id[0]:08x}{image_id[1]:08x}"


def test_of_image_tokens_computed_before_it_shows_the_pixels(folder, monkeypatch):
    config = tiny.recipe("stage1", folder, **{"data.feature_views": 3})
    task, (batch,) = first_batches(config, 1)
    monkeypatch.setattr(frozen, "load_vision", lambda *arguments, **more: pytest.fail("weights were read"))
    facts, (shown,) = preview.look(config, 1, 128)
    pixels = np.stack([row.image for row in shown.rows])
    assert pixels.shape == (8, 64, 64, 3)
    np.testing.assert_allclose(np.asarray(task.encode(pixels)), batch["image_embeds"], rtol=2e-3, atol=2e-3)
    assert "3 views of each" in facts["images"]


def test_stage_1_says_which_terms_a_row_takes_part_in(folder, no_weights):
    changes = {"objective.itm_share": 0.5, "objective.itg_share": 0.25, "data.feature_views": 0}
    _, (shown,) = preview.look(tiny.recipe("stage1", folder, **changes), 1, 128)
    labels = [[line.label for line in row.lines] for row in shown.rows]
    both, one, writes = "ITC and ITM read", "ITC read", "ITG writes, behind [DEC]"
    assert labels == [[both, writes], [one], [both], [one]] * 2
    for row in shown.rows[::4]:
        words = row.caption.lower().rstrip(".").split()
        assert texts(row.lines[0], "read") == ["[CLS]", *words, "[SEP]"]
        assert texts(row.lines[1], "predicted") == [*words, "[SEP]"]
        assert texts(row.lines[1], "read") == []
    without = tiny.recipe("stage1", folder, **{"objective.itg": 0, "objective.itm": 0, "data.feature_views": 0})
    assert {line.label for row in preview.look(without, 1, 8)[1][0].rows for line in row.lines} == {one}


def test_rows_that_are_alike_are_no_negatives(folder, no_weights):
    config = tiny.recipe("stage1", folder, **{"batch_size": 36, "data.feature_views": 0})
    _, (shown,) = preview.look(config, 1, 36)  # Two epochs of 18 images.
    keys = [row.key for row in shown.rows]
    for number, row in enumerate(shown.rows):
        other = next(other for other, key in enumerate(keys) if key == row.key and other != number)
        assert row.alike == {"same image, so not a negative": [other], "same text, so not a negative": [other]}
    assert "18 different images, 18 different texts" in shown.summary
    _, (few,) = preview.look(config, 1, 5)
    assert [row.key for row in few.rows] == keys[:5]
    assert few.summary.startswith("5 of 36 rows")


def test_stage_2_says_what_is_read_and_what_has_loss(folder, no_weights):
    config = tiny.recipe("stage2", folder, **{"data.feature_views": 0, "data.max_text_tokens": 20})
    _, (shown,) = preview.look(config, 1, 128)
    for row in shown.rows:
        (line,) = row.lines
        assert texts(line, "soft") == ["<|endoftext|>", "2 queries"]
        assert "".join(texts(line, "read")) == "A drawing of"
        assert "".join(texts(line, "predicted")) == f" {row.caption.lower().rstrip('.')}\n"
        kinds = [kind for kind, _ in itertools.groupby(token.kind for token in line.tokens)]
        assert kinds in (["soft", "read", "predicted", "padding"], ["soft", "read", "predicted"])


def test_an_encoder_decoder_reads_apart(folder, t5, no_weights):
    changes = {"llm": t5, "data.begin": "", "data.end": "", "data.feature_views": 0}
    changes["data.max_text_tokens"] = 20
    _, (shown,) = preview.look(tiny.recipe("stage2", folder, **changes), 1, 128)
    for row in shown.rows:
        reads, writes = row.lines
        assert (reads.label, writes.label) == ("encoder reads", "decoder writes")
        assert texts(reads, "soft") == ["2 queries"]
        assert "".join(texts(reads, "read")) == "A drawing of<|im_end|>"
        assert texts(writes, "read", "soft") == []
        assert "".join(texts(writes, "predicted")).strip() == f"{row.caption.lower().rstrip('.')}<|im_end|>"


class Dangerous:
    """Captions that look like HTML, and a record that cannot be used."""

    identity = "dangerous"

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == 1:
            raise BadRecord("unreadable", "<k1>", "expected an image, found <html>")
        image = io.BytesIO()
        Image.new("RGB", (70, 50), "teal").save(image, "PNG")
        return {"key": f"<k{index}>", "image": image.getvalue(), "captions": ["a <b> & c"]}


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    """Of a mixture, as text."""
    directory = tmp_path_factory.mktemp("page")
    opened = lambda name: Dangerous() if name == "dangerous:" else open_source(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "open_source", opened)
        patch.setenv("BLIP2_JAX_CACHE", str(folder / "cache"))
        config = tiny.recipe("stage1", folder)
        settings = {
            name: config[name] if "." not in name else config.data[name.partition(".")[2]]
            for name in ("bert", "image_size", "batch_size", "data.max_text_tokens")
        }
        settings |= {f"model.{name}": config.model[name] for name in ("layers", "queries", "embed_width")}
        settings["data.train"] = f"{config.data.train}@0.5 + dangerous:@0.5"
        recipe = pathlib.Path(tiny.__file__).parent.parent / "configs" / "stage1.py"
        overrides = [f"--config.{name}={value}" for name, value in settings.items()]
        handler = signal.getsignal(signal.SIGTERM)
        command.main(["preview", f"--config={recipe}", f"--output={directory}/preview.html", *overrides])
        signal.signal(signal.SIGTERM, handler)
    return (directory / "preview.html").read_text()


def test_the_page_shows_every_row_with_its_image(page):
    assert page.count("<article") == 16
    assert page.count("<h2>Batch") == 2
    images = re.findall(r'<img [^>]*src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(images) == 16
    for encoded in images:
        assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (64, 64)


def test_the_page_needs_nothing_else(page):
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert not re.findall(r"url\(|@import|<script|https?:", page)
    links, places = set(re.findall(r'href="#(\w+)"', page)), set(re.findall(r'id="(\w+)"', page))
    assert links
    assert links <= places


def test_the_page_takes_texts_as_texts(page):
    assert "<b> & c" not in page
    assert "a &lt;b&gt; &amp; c" in page
    assert re.search(r"row \d+ · &lt;k[02]&gt; · dangerous:", page)


def test_the_page_lists_what_could_not_be_used(page):
    rejected = re.findall(r"<li><b>unreadable</b> <span>&lt;k1&gt;</span> .*?&lt;html&gt;.*?<small>dangerous:", page)
    counted = [int(number) for number in re.findall(r"(\d+) records rejected", page)]
    assert len(rejected) == sum(counted) > 0


def test_the_page_says_what_it_is_of(page):
    said = html.unescape(re.search(r"<dl.*?</dl>", page)[0])
    for fact in ("64 x 64 pixels", "8 rows, seed 0", "at most 6 tokens, lower case", "50 % of the rows, 18 records"):
        assert fact in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--output=x.html", "error: preview needs --config=FILE and --output=FILE"),
        ("--config=configs/stage1.py --output=x.html more", "nothing else, found more"),
        ("--config=configs/stage1.py --output=x.html --config.data.trai=a", "error: .*trai"),
        ("--config=configs/stage1.py --output=x.html --batches=0", "error: .*batches"),
        ("--config=configs/stage1.py --output=x.html --config.data.train=nowhere:a", "error: data source 'nowhere:a'"),
    ],
)
def test_errors_are_one_line(arguments, message, monkeypatch):
    monkeypatch.chdir(pathlib.Path(tiny.__file__).parent.parent)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match=message):
        command.main(["preview", *arguments.split()])
    signal.signal(signal.SIGTERM, handler)
    assert not pathlib.Path("x.html").exists()
