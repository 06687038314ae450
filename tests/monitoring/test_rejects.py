"""Rejected records: counted, listed, cut back on resumption, and too many an error."""

import json

import pytest

from blip2_jax.monitoring.rejects import Rejects


def reject(reason, key="7"):
    return {"source": "folder:web", "key": key, "reason": reason, "detail": "why"}


def test_rejects_are_counted_and_listed(tmp_path):
    rejects = Rejects(tmp_path, step=0, limit=0.5, known={})
    rejects.add(1, [reject("truncated"), reject("missing")])
    rejects.add(2, [])
    rejects.add(3, [reject("missing", "8")])
    assert rejects.by_reason() == {"missing": 2, "truncated": 1}
    rejects.close()
    rows = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 1, **reject("truncated")},
        {"step": 1, **reject("missing")},
        {"step": 3, **reject("missing", "8")},
    ]


def test_a_resumed_run_goes_on_counting(tmp_path):
    first = Rejects(tmp_path, step=0, limit=0.5, known={})
    for step in (1, 2, 3):
        first.add(step, [reject("missing")])
    first.close()
    (tmp_path / "rejects-1.jsonl").write_text(
        "".join(json.dumps({"step": step, **reject("cmyk")}) + "\n" for step in (1, 3))
    )
    second = Rejects(tmp_path, step=2, limit=0.5, known={"missing": 2, "cmyk": 1})
    second.add(3, [reject("missing")])
    assert second.by_reason() == {"missing": 3, "cmyk": 1}
    second.close()
    steps = [json.loads(line)["step"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert len((tmp_path / "rejects-1.jsonl").read_text().splitlines()) == 1


def test_too_many_rejects_end_a_run(tmp_path):
    rejects = Rejects(tmp_path, step=0, limit=0.1, known={"missing": 99})
    rejects.check(rejects.by_reason(), used=800)  # Too few to tell.
    rejects.check(rejects.by_reason(), used=901)
    rejects.add(1, [reject("missing")] * 10)
    with pytest.raises(ValueError, match=r"109 of 1,009 records .* more than data.max_rejected = 0.1: see .*rejects"):
        rejects.check(rejects.by_reason(), used=900)
    rejects.close()
