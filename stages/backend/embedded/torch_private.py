"""The private names of torch that the embedded device uses, with what each stands for.

torch may change them without notice: tests/stages/backend/embedded/test_torch_private.py fails when it does.
"""

import torch

HAS_ONEDNN = bool(torch._C._has_mkldnn)
"""Whether torch was built with oneDNN."""

MULTIPLIES_BFLOAT16 = HAS_ONEDNN and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
"""Whether products of bfloat16 are as fast as they are on processors with instructions for them (AVX-512 and later).
Otherwise torch computes them value by value, up to 100 times slower than products of float32."""

HAS_BFLOAT16_TILES = bool(torch.cpu._is_amx_tile_supported())
"""Whether there are instructions for whole tiles of bfloat16 (AMX), with which these products are the fastest."""

without_torch_function = torch._C.DisableTorchFunction
"""A context manager in which torch calls neither `__torch_function__` nor a `TorchFunctionMode`."""


def pack_blocked(matrix: torch.Tensor) -> torch.Tensor:
    """Copies a contiguous matrix [N, K] into oneDNN's blocked layout."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix)
    return packed


def blocked_product(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Multiplies x [..., K] by a matrix [N, K] of `pack_blocked`: [..., N]."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return product
