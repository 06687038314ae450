"""What a device can do at best, by the name that jax has for it."""

import pytest

from blip2_jax.parallel import chips


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5e", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L4", 121),
    ],
)
def test_peaks_of_datasheets(kind, teraflops):
    assert chips.peak_flops(kind) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize("kind", ["cpu", "TPU v2", "TPU v7x", "NVIDIA A10G", "NVIDIA A1000", "NVIDIA L400", "Radeon"])
def test_what_no_datasheet_here_has_is_not_guessed(kind):
    assert chips.peak_flops(kind) is None
