"""A summary's numbers beside their baselines."""

from blip2_jax.monitoring import comparison

SPLITS = {
    "test_drawing": {
        "retrieval": {"itc": {"text_to_image": {"r1": 0.5, "r5": 0.7}}},
        "question": {"accuracy": 0.3},
        "shuffled_image_loss_increase": 1.25,
        "baselines": {
            "chance": {"retrieval": {"text_to_image": {"r1": 0.01, "r5": 0.05}}},
            "majority": {"question": {"accuracy": 0.4}},
        },
    }
}


def test_rows_stand_beside_their_baselines():
    rows = {row.label: row for row in comparison.rows(SPLITS["test_drawing"])}
    assert rows["text to image R@1, ITC"].baselines[0] == 0.01
    assert not rows["text to image R@1, ITC"].below
    assert rows["category answered"].below
    assert not rows["its rise with wrong pictures"].below
    assert "caption exact match" not in rows


def test_what_is_below_a_baseline_is_marked():
    line = {line[:32].strip(): line for line in comparison.text(SPLITS).splitlines()}
    assert "0.300 <" in line["category answered"]
    assert "<" not in line["text to image R@1, ITC"]
    page = comparison.table(SPLITS)
    assert '<td class="below"><b>0.300</b></td>' in page
    assert '<td class="below"><b>0.500</b></td>' not in page
