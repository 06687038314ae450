"""The commands that use what was trained: generate and evaluate."""

import json
import re

import numpy as np
import pytest

from blip2_jax import api, evaluate, generate, tasks
from blip2_jax.decoding import GenerationConfig
from blip2_jax.evaluation import attention

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def pictures(folder, stage2):
    return sorted((folder / "pictures").glob("*.png"))[:3]


def test_one_line_a_picture(stage2, pictures, capsys):
    generate.main(["--checkpoint", str(stage2), "--image", *map(str, pictures), "--max_new_tokens", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("\t")[0] for line in lines] == [str(picture) for picture in pictures]
    assert all("\t" in line for line in lines)


def test_a_picture_gets_the_same_text_in_any_company(stage2, pictures):
    model = api.load(stage2)
    together = generate.write(model, pictures, GenerationConfig(8, num_beams=3))
    assert [generate.write(model, [picture], GenerationConfig(8, num_beams=3))[0] for picture in pictures] == together


def test_the_prompt_matters(stage2, pictures):
    model = api.load(stage2)
    first, second = (model.write(pictures, [prompt] * 3, GenerationConfig(8)) for prompt in ("Question:", "a red"))
    assert first != second


def test_errors_name_the_file(stage1, stage2, folder, pictures, tmp_path, capsys):
    text = tmp_path / "text.jpg"
    text.write_text("not a picture")
    for arguments, message in (
        (["--checkpoint", str(stage2), "--image", str(text)], r"text\.jpg: not a picture"),
        (["--checkpoint", str(stage2), "--image", str(tmp_path / "no.png")], r"No such file.*no\.png"),
        (["--checkpoint", str(stage1), "--image", str(pictures[0]), "--prompt", "a"], "no language model to read one"),
        (["--checkpoint", str(stage1), "--image", str(pictures[0]), "--question", "a"], "no language model to write"),
        (
            ["--checkpoint", str(stage2), "--image", str(pictures[0]), "--prompt", " "],
            "--prompt is empty: leave it out",
        ),
        (["--checkpoint", str(stage2), "--image", str(pictures[0]), "--num_beams", "0"], "num_beams = 0: expected at"),
        (["--checkpoint", str(tmp_path), "--image", str(pictures[0])], "holds no checkpoint"),
    ):
        with pytest.raises(SystemExit) as caught:
            generate.main(arguments)
        written = capsys.readouterr()
        assert re.search(f"error: .*{message}", f"{written.err}{caught.value}")
        assert written.out == ""


@pytest.fixture(scope="module")
def measured(folder, stage1, stage2, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluate") / "new"
    source = f"jsonl:{folder / 'pictures' / 'pictures.jsonl'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP2_JAX_CACHE", str(folder / "cache"))
        evaluate.main(
            f"--checkpoint={stage1} --checkpoint={stage2} --data={source} --output={output} "
            "--seconds_setup=3 --started=0".split()
        )
    return output, source


def test_the_summary_has_every_number_beside_its_baselines(measured):
    output, source = measured
    summary = json.loads((output / "summary.json").read_text())
    assert summary["seconds_setup"] == 3
    assert summary["seconds"] > 1e9
    split = summary["splits"][source.partition(":")[2]]
    for found in (split["retrieval"]["itc"], split["retrieval"]["itm"], split["baselines"]["chance"]["retrieval"]):
        for direction in ("text_to_image", "image_to_text"):
            assert set(found[direction]) == {"r1", "r5", "r10"}
    # The pictures it is measured on are those it was trained on, so the nearest one is the picture itself.
    assert split["baselines"]["nearest_neighbour_by_token"]["caption"]["exact_match"] == 1
    assert np.isfinite(split["shuffled_image_loss_increase"])
    assert set(split["caption"]) >= {"bleu_4", "rouge_l", "cider", "exact_match", "token_f1", "loss"}


def test_the_report_shows_all_of_it(measured):
    page = (measured[0] / "report.html").read_text()
    for part in ("Measured, beside", "Training of stage1", "Training of stage2", "Captions written for", "with ITM"):
        assert part in page
    assert page.partition("Where the queries look")[2].count("<img") == 2 * 6 * 2  # Stages, pictures, queries.
    assert not re.findall(r'(?:src|href)="(?!data:)|url\((?!data:)', page)


def test_nothing_to_evaluate_is_an_error(stage1, tmp_path):
    with pytest.raises(SystemExit, match="error: data source 'folder'"):
        evaluate.main(["--checkpoint", str(stage1), "--data", "folder", "--output", str(tmp_path / "o")])
    assert not (tmp_path / "o").exists()


def test_attention_is_a_distribution_over_the_picture(stage1, stage2, pictures):
    for workdir in (stage1, stage2):
        task, trainable = tasks.load_trained(workdir)
        embeds = np.asarray(task.encode(np.stack([api.seen(picture, task.config.image_size) for picture in pictures])))
        weights = attention.cross_attention(task, trainable, embeds)
        assert weights.shape == (3, 2, embeds.shape[1])
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        assert weights.min() >= 0
