"""What is shown while a run goes on: a line a logged step, or a bar in a terminal."""

import io
import sys

from blip2_jax.monitoring.progress import TrainingProgress, evaluated, line

ROW = {
    "step": 40,
    "loss": 7.1234,
    "loss_itc": 3.2,
    "loss_itm": None,
    "itm_accuracy_positive": 0.25,
    "itm_accuracy_negative": 0.875,
    "temperature": 0.0712,
    "gradient_norm": 1.25,
    "learning_rate": 3e-4,
    "skipped_steps": 2,
    "timing/images_per_second": 31.23,
    "timing/images_per_second_per_chip": 15.6,
    "timing/flops_per_second_per_chip": 4.2e13,
    "timing/mfu": 0.412,
    "timing/data_share": 0.02,
    "timing/seconds_left": 432.0,
}
FOUND = {
    "eval/nano:val/retrieval/itc/text_to_image/r1": 0.5,
    "eval/nano:val/retrieval/itc/text_to_image/r10": 0.9,
    "eval/nano:val/loss_itc": 1.25,
    "eval/jsonl:/a/b.jsonl/caption/cider": 0.75,
}


def test_a_line_has_all_that_matters():
    assert line(ROW) == (
        "loss 7.123 (itc 3.200, itm not finite), skipped 2, itm accuracy positive 25.0%, negative 87.5%, "
        "temperature 0.0712, gradient norm 1.25, learning rate 0.0003, images/s 31.2, a chip 15.6, "
        "TFLOP/s a chip 42, MFU 41.2%, data wait 2.0%, left 7:12"
    )
    assert line({"step": 1, "loss": 2.0, "skipped_steps": 0}) == "loss 2.000"


def test_an_evaluation_has_a_line_a_source():
    assert evaluated(ROW) == []
    assert evaluated(FOUND) == [
        "nano:val: retrieval/itc/text_to_image/r1 0.500, loss_itc 1.250",
        "jsonl:/a/b.jsonl: caption/cider 0.750",
    ]


def show():
    with TrainingProgress("stage1", 50, 39) as shown:
        shown.step()
        shown.logged(ROW | FOUND)
        shown.step()


def test_where_there_is_no_terminal_each_logged_step_is_a_line(capsys):
    show()
    first, *evaluations = capsys.readouterr().err.splitlines()
    assert first == f"stage1 step 40/50: {line(ROW)}"
    assert [text.partition(": ")[0] for text in evaluations] == [
        "stage1 step 40/50, nano:val",
        "stage1 step 40/50, jsonl:/a/b.jsonl",
    ]


def test_a_terminal_has_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    show()
    text = terminal.getvalue()
    assert "41/50" in text
    assert "loss 7.123 (itc 3.200, itm not finite)" in text
    assert "stage1 step 40/50:" not in text
