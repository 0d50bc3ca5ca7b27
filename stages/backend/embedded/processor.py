"""What this processor, and the libraries that torch was built with, multiply fastest."""

import torch

HAS_ONEDNN = bool(torch._C._has_mkldnn)

MULTIPLIES_BFLOAT16 = HAS_ONEDNN and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""Whether products of bfloat16 are as fast as they are on processors with instructions for them (AVX-512 and later).
Elsewhere torch takes them value by value, up to 100 times slower than products of float32."""

HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
"""Whether there are products by weights held in halves (x86 with AVX2 and later)."""


def widened(x: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype in which this processor multiplies it: bfloat16 becomes float32 where that is faster."""
    return x.float() if x.dtype == torch.bfloat16 and not MULTIPLIES_BFLOAT16 else x
