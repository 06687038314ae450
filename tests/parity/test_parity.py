"""Every golden case against our models: one item a case and group of quantities.

pytest tests/parity --golden DIR [--mesh data=2,fsdp=2] [--strict]
"""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import pytest

from blip2_jax.parallel import mesh as meshes
from tests.parity import forward_stage1, forward_stage2
from tests.parity.golden import Case

GROUPS = ("forward", "gradients", "training", "decoding")
_TRANSFORMERS = {
    "Blip2ForConditionalGeneration": forward_stage2.conditional_generation,
    "Blip2Model": forward_stage2.conditional_generation,
    "InstructBlipForConditionalGeneration": forward_stage2.conditional_generation,
    "Blip2ForImageTextRetrieval": forward_stage2.image_text_retrieval,
}
_LOSS = 1e-5
_LOGITS = 1e-4  # Of T5 and InstructBLIP.
_OUTPUT = 5e-5


def forward_of(case: Case):
    """The function that computes a case, or None."""
    if case.program == "hf":
        return _TRANSFORMERS.get(case.meta["class_name"])
    return getattr(forward_stage1, case.name, None) or getattr(forward_stage2, case.name, None)


def tolerance(case: Case, quantity: str) -> float:
    if "loss" in quantity:
        return _LOSS
    wide = "t5" in case.name or "instruct" in case.name
    return _LOGITS if quantity.endswith("logits") and wide else _OUTPUT


def pytest_generate_tests(metafunc):
    golden = pathlib.Path(metafunc.config.getoption("--golden"))
    folders = sorted(folder for folder in golden.glob("*/*") if (folder / "meta.json").exists())
    items = [(folder, group) for folder in folders for group in GROUPS]
    names = [f"{folder.parent.name}-{folder.name}-{group}" for folder, group in items]
    metafunc.parametrize(("folder", "group"), items, ids=names)


@pytest.fixture(scope="session")
def mesh(request):
    text = request.config.getoption("--mesh")
    if not text:
        return None
    count = int(np.prod([int(size.partition("=")[2]) for size in text.split(",")]))
    return meshes.make_mesh(text, jax.devices()[:count])


def test_case(folder, group, mesh, request):
    case = Case(folder)
    compute = forward_of(case) if group == "forward" else None
    if compute is None:
        message = f"{case.program}/{case.name}: {group} is not built yet"
        (pytest.fail if request.config.getoption("--strict") else pytest.skip)(message)
    found = compute(case, mesh)
    assert found, "nothing was compared"
    lines, wrong = [], []
    for name, value in found.items():
        ours, recorded = value if isinstance(value, tuple) else (value, case.outputs[name])
        assert ours.shape == recorded.shape, f"{name}: shape {ours.shape}, recorded {recorded.shape}"
        error, allowed = float(np.abs(ours - recorded).max()), tolerance(case, name)
        lines.append(f"{name}: largest error {error:.1e}, allowed {allowed:.0e}")
        if not error <= allowed:
            wrong.append(lines[-1])
    print("\n".join(lines))
    assert not wrong, "\n".join(wrong)
