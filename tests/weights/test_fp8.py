"""Block FP8: against plain quantisation and dequantisation, for any shape."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.checkpoints import ScaleFormat, dequantise_plainly, quantise
from weights.checkpoint import dequantise, scale_shape

SIZES = st.one_of(st.integers(1, 400), st.sampled_from([1, 127, 128, 129, 255, 256, 257, 384]))


@settings(max_examples=60, deadline=None)
@given(rows=SIZES, columns=SIZES, seed=st.integers(0, 2**32))
def test_dequantising_equals_the_plain_way_to_the_bit(rows: int, columns: int, seed: int) -> None:
    weight, scales = quantise(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    assert scales.shape == scale_shape((rows, columns))
    values = dequantise(weight, scales)
    assert values.dtype == torch.float32
    assert torch.equal(values, dequantise_plainly(weight, scales))


@settings(max_examples=30, deadline=None)
@given(rows=SIZES, columns=SIZES, seed=st.integers(0, 2**32))
def test_values_survive_up_to_the_rounding_of_fp8(rows: int, columns: int, seed: int) -> None:
    original = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight, scales = quantise(original)
    error = (dequantise(weight, scales) - original).abs()
    # E4M3 has 3 bits of mantissa: half a step is 2^-4 of a normal value, and 2^-10 of the unit below them.
    bound = original.abs() * 2**-4 + scales.max() * 2**-10
    assert bool((error <= bound * (1 + 1e-5)).all())


def test_every_fp8_value_is_kept_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(2, 127)
    values = dequantise(codes.view(torch.float8_e4m3fn), torch.ones(1, 1))
    exponent, mantissa = (codes.int() >> 3) & 15, codes.int() & 7
    normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    subnormal = mantissa / 8 * 2.0**-6
    expected = torch.where(exponent > 0, normal, subnormal) * torch.where(codes.int() >> 7 == 1, -1.0, 1.0)
    assert torch.equal(values, expected)


def test_products_are_not_rounded_to_bfloat16() -> None:
    scale = 1.0 + 2**-20
    values = dequantise(torch.full((1, 1), 1.5).to(torch.float8_e4m3fn), torch.full((1, 1), scale))
    assert values.item() == 1.5 * scale


@pytest.mark.parametrize("scale_format", ["ue8m0", "e8m0"])
def test_scales_that_are_powers_of_two_lose_nothing(scale_format: ScaleFormat) -> None:
    """Times a power of two every product is exact in float32, whether the scale is stored whole or as its exponent."""
    original = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    weight, scales = quantise(original, scale_format)
    assert scales.dtype == (torch.float8_e8m0fnu if scale_format == "e8m0" else torch.float32)
    values = dequantise(weight, scales.to(torch.float32))
    assert torch.equal(values, dequantise_plainly(weight, scales))
    spread = scales.double().repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert torch.equal(values.double(), weight.double() * spread)
    assert torch.equal(values, dequantise(*quantise(original, "ue8m0")))


PEAK = """
import torch
from pathlib import Path
from weights.checkpoint import dequantise, scale_shape

def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
dequantise(torch.zeros(256, 256).to(torch.float8_e4m3fn), torch.ones(2, 2))
weight = torch.zeros(2048, 8000, dtype=torch.uint8).view(torch.float8_e4m3fn)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
values = dequantise(weight, torch.ones(scale_shape(weight.shape)))
print((peak() - before) / (values.numel() * 4))
"""


def test_the_peak_is_one_tensor() -> None:
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, timeout=120, check=True)
    assert 0.9 < float(run.stdout) < 1.2
