"""What this processor, and the libraries that torch was built with, multiply fastest."""

import sys

import torch

HAS_ONEDNN = bool(torch._C._has_mkldnn)

MULTIPLIES_BFLOAT16 = HAS_ONEDNN and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""Whether products of bfloat16 are as fast as they are on processors with instructions for them (AVX-512 and later).
Elsewhere torch takes them value by value, up to 100 times slower than products of float32."""

HAS_BFLOAT16_TILES = bool(torch.cpu._is_amx_tile_supported())
"""Whether there are instructions for whole tiles of bfloat16 (AMX), with which these products outrun all others."""

HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
"""Whether there are products by weights held in halves (x86 with AVX2 and later)."""


def _wide_from_rows() -> int:
    if not MULTIPLIES_BFLOAT16:
        return 1
    return sys.maxsize if HAS_BFLOAT16_TILES else 128


WIDE_FROM_ROWS = _wide_from_rows()
"""Rows from which a product of bfloat16 takes longer than one of float32, operands widened for it.

Without instructions for bfloat16 it always does. AVX-512's instructions for pairs read half as much, and so win while
that is what takes the time; from some 100 rows on, float32 is 1.4 to 2 times as fast.
"""


def widened(x: torch.Tensor, rows: int) -> torch.Tensor:
    """`x` in the dtype in which this processor multiplies so many rows by it: bfloat16, or float32 where faster."""
    return x.float() if x.dtype == torch.bfloat16 and rows >= WIDE_FROM_ROWS else x
