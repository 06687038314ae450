"""The paper's corpora: what the recipes train on, and what is said of a corpus that is not there."""

import math
import shlex

import pytest

from blip2_jax.data import corpora, sources
from blip2_jax.data.mixture import parse_mixture
from blip2_jax.data.sources import names
from tests import sources as tiny
from tests.test_configs import recipe


def test_the_paper_trains_on_129_million_images():
    assert sum(corpus.paper_images for corpus in corpora.CORPORA) == pytest.approx(129e6, rel=0.01)
    assert [corpus.name for corpus in corpora.CORPORA] == ["coco", "visual_genome", "sbu", "cc3m", "cc12m", "laion"]
    for corpus in corpora.CORPORA:
        assert corpus.images >= 0.95 * corpus.paper_images
        assert corpus.captions >= corpus.images


def test_weights_are_shares():
    assert sum(corpus.weight for corpus in corpora.CORPORA) == pytest.approx(1)
    parsed = parse_mixture(corpora.mixture("gs/corpora"))
    assert parsed == [
        (f"arrayrecord:gs/corpora/{corpus.name}/*.arrayrecord", pytest.approx(corpus.weight))
        for corpus in corpora.CORPORA
    ]


def test_reasons_tell_how_often_stage_1_draws():
    """The numbers in the table follow from the recipe."""
    config = recipe("stage1", "eva_g")
    examples = config.total_steps * config.batch_size
    draws = {corpus.name: corpus.weight * examples / corpus.paper_captions for corpus in corpora.CORPORA}
    said = {
        "coco": ("30 draws", 30),
        "sbu": ("ten draws", 10),
        "cc3m": ("eleven draws", 11),
        "cc12m": ("seven draws", 7),
    }
    said["laion"] = ("2.4 draws", 2.4)
    for corpus in corpora.CORPORA:
        if corpus.name in said:
            words, number = said[corpus.name]
            assert words in corpus.reason
            assert math.isclose(draws[corpus.name], number, rel_tol=0.03)


@pytest.mark.parametrize("corpus", corpora.CORPORA, ids=lambda corpus: corpus.name)
def test_what_is_prepared_is_a_source(corpus):
    """As the shell reads the command, and of a kind and with options that there are."""
    command = shlex.split(corpus.prepare())
    assert command[:4] == ["python", "-m", "blip2_jax.data", "prepare"]
    assert command[4:] == ["--source", corpus.source, "--output", f"data/{corpus.name}"]
    assert names.parse(corpus.source)[0] in sources._KINDS
    with pytest.raises(FileNotFoundError):
        sources.open_source(corpus.source)


@pytest.mark.parametrize("stage, variant", [("stage1", "eva_g"), ("stage1", "clip_l"), ("stage2", "opt_2_7b")])
def test_recipes_ship_the_mixture(stage, variant):
    assert recipe(stage, variant).data.train == corpora.mixture()


@pytest.mark.parametrize("corpus", corpora.CORPORA, ids=lambda corpus: corpus.name)
def test_a_missing_corpus_says_how_to_make_it(corpus, tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        sources.open_source(f"arrayrecord:{tmp_path}/{corpus.name}/*.arrayrecord")
    message = str(raised.value)
    assert f"arrayrecord:{tmp_path}/{corpus.name}/*.arrayrecord: no file matches" in message
    assert all(command in message for command in corpus.download)
    assert corpus.prepare(str(tmp_path)) in message


def test_others_are_on_their_own(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        sources.open_source(f"arrayrecord:{tmp_path}/mine/*.arrayrecord")
    assert "img2dataset" not in str(raised.value)
    tiny.arrayrecord(tmp_path / "coco")
    assert len(sources.open_source(f"arrayrecord:{tmp_path}/coco/*.arrayrecord")) == tiny.COUNT
