"""Reductions and choices along a dimension."""

from collections.abc import Sequence

import torch

from stages.backend.embedded.chips import on_chips, refuse, refuse_all_but_float_tiles, unary
from stages.backend.embedded.dtype import INTEGERS, ROW_MAJOR_LAYOUT, TILE_LAYOUT, float32, uint16, uint32
from stages.backend.embedded.memory import MemoryConfig
from stages.backend.embedded.program_configs import WormholeComputeKernelConfig
from stages.backend.embedded.tensor import Tensor


def sum(
    input_tensor: Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Sums over `dim`, or over all."""
    dims = tuple(dim) if isinstance(dim, Sequence) else dim
    return unary("sum", lambda a: torch.sum(a, dims, keepdim), input_tensor)


def topk(
    input_tensor: Tensor,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
    *,
    memory_config: MemoryConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """The `k` largest values along `dim` and their indices: uint32 for float32 input, else uint16.

    Raises DeviceError for integers and for ROW_MAJOR layout.
    """
    x = input_tensor
    refuse_all_but_float_tiles("topk", x)
    chosen = on_chips("topk", lambda a: torch.topk(a, k, dim, largest, sorted), x)
    values = Tensor([pair[0] for pair in chosen], x.dtype, x.layout, x.mesh)
    return values, Tensor([pair[1] for pair in chosen], uint32 if x.dtype is float32 else uint16, TILE_LAYOUT, x.mesh)


def argmax(
    input_tensor: Tensor,
    *,
    dim: int | None = None,
    keepdim: bool = False,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """The uint32 index of the largest value along `dim`, or of all values."""
    x = input_tensor
    shards = on_chips("argmax", lambda a: torch.argmax(a, dim, keepdim), x)
    return Tensor(shards, uint32, ROW_MAJOR_LAYOUT, x.mesh)


def softmax(
    input_tensor: Tensor,
    dim: int = -1,
    *,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    numeric_stable: bool = True,
) -> Tensor:
    """exp(x) over its sum along `dim`, in float32, rounded to x's dtype. Raises DeviceError for integers."""
    if input_tensor.dtype in INTEGERS:
        refuse("softmax", f"it takes floats, not {input_tensor.dtype.name}", input_tensor)
    return unary("softmax", lambda a: torch.softmax(a, dim, dtype=torch.float32).to(a.dtype), input_tensor)
