"""Elementwise ops and reductions."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual name

from stages.backend.embedded.chips import binary, on_chips, refuse, refuse_all_but_float_tiles, unary
from stages.backend.embedded.dtype import (
    BLOCK_FLOATS,
    INTEGERS,
    ROW_MAJOR_LAYOUT,
    TILE_LAYOUT,
    DataType,
    float32,
    held_in,
    uint8,
    uint16,
    uint32,
)
from stages.backend.embedded.memory import MemoryConfig
from stages.backend.embedded.program_configs import UnaryOpType, WormholeComputeKernelConfig
from stages.backend.embedded.tensor import Tensor
from stages.errors import DeviceError

LARGEST = {uint8: (1 << 8) - 1, uint16: (1 << 16) - 1, uint32: (1 << 32) - 1}
"""The largest value of each unsigned dtype."""


def fill(
    input_tensor: Tensor,
    fill_value: float,
    *,
    memory_config: MemoryConfig | None = None,
    output_tensor: Tensor | None = None,
) -> Tensor:
    """Returns a tensor like `input_tensor` filled with `fill_value`, or fills `output_tensor` and returns it.

    Raises DeviceError if the two have different shapes.
    """
    filled = unary("fill", lambda a: torch.full_like(a, fill_value), output_tensor or input_tensor)
    if output_tensor is None:
        return filled
    if output_tensor.shape != input_tensor.shape:
        refuse("fill", "it cannot fill a tensor of another shape", input_tensor, output_tensor)
    output_tensor.shards = filled.shards
    output_tensor.forget_derived()
    return output_tensor


def add(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor | float,
    *,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Computes a + b with broadcasting, in a's dtype unless `dtype` is given."""
    return _combined("add", torch.add, input_tensor_a, input_tensor_b, dtype)


def subtract(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor | float,
    *,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Computes a - b with broadcasting, in a's dtype unless `dtype` is given."""
    return _combined("subtract", torch.sub, input_tensor_a, input_tensor_b, dtype)


def mul(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor | float,
    *,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
    input_tensor_a_activations: Sequence[UnaryOpType] = (),
) -> Tensor:
    """Computes a * b, or silu(a) * b, with broadcasting, in a's dtype unless `dtype` is given."""
    function: Callable[..., torch.Tensor] = _silu_mul if input_tensor_a_activations else torch.mul
    return _combined("mul", function, input_tensor_a, input_tensor_b, dtype)


def div(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor | float,
    *,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Computes a / b with broadcasting, in a's dtype unless `dtype` is given."""
    return _combined("div", torch.div, input_tensor_a, input_tensor_b, dtype)


multiply = mul
divide = div
sub = subtract


def silu(input_tensor: Tensor, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Computes x * sigmoid(x). Raises DeviceError for integers."""
    _refuse_integers("silu", input_tensor)
    return unary("silu", F.silu, input_tensor)


def sigmoid(input_tensor: Tensor, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Computes 1 / (1 + exp(-x)). Raises DeviceError for integers."""
    _refuse_integers("sigmoid", input_tensor)
    return unary("sigmoid", torch.sigmoid, input_tensor)


def typecast(input_tensor: Tensor, dtype: DataType, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Converts to another dtype, without a copy if both are held in the same torch dtype.

    As on Wormhole, floats are rounded to uint16 and truncated to other integers; values outside the range of an
    unsigned dtype become its nearest end, except for uint8, which wraps around. Raises DeviceError for a block float
    dtype in ROW_MAJOR layout."""
    x = input_tensor
    if not x.shards:
        raise DeviceError("typecast: a tensor was used after deallocate().")
    if dtype in BLOCK_FLOATS and x.layout is not TILE_LAYOUT:
        refuse("typecast", f"{dtype.name} exists in TILE layout only", x)
    if dtype in INTEGERS and dtype is not x.dtype:
        return Tensor(unary("typecast", lambda a: _whole(a, x.dtype, dtype), x).shards, dtype, x.layout, x.mesh)
    held = held_in(dtype)
    if x.shards[0].dtype == held:
        return Tensor(x.shards, dtype, x.layout, x.mesh)
    return Tensor(unary("typecast", lambda a: a.to(held), x).shards, dtype, x.layout, x.mesh)


def _whole(a: torch.Tensor, source: DataType, target: DataType) -> torch.Tensor:
    if target is uint16 and source not in INTEGERS and source not in BLOCK_FLOATS:
        a = torch.floor(a + 0.5)
    whole = a.long()
    if target is uint8:
        return whole.remainder_(LARGEST[uint8] + 1)
    return whole.clamp_(0, LARGEST[target]) if target in LARGEST else whole


def _silu_mul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.silu(a) * b


def _combined(
    op: str, function: Callable[..., torch.Tensor], a: Tensor, b: Tensor | float, dtype: DataType | None
) -> Tensor:
    if not isinstance(b, Tensor):
        return _in_dtype(unary(op, lambda x: function(x, b), a), dtype)
    if a.dtype is not b.dtype and (a.dtype in INTEGERS) is not (b.dtype in INTEGERS):
        refuse(op, f"it mixes {a.dtype.name} with {b.dtype.name}", a, b)
    output = binary(op, function, a, b)
    if dtype is None and a.dtype is b.dtype:
        return output
    return _in_dtype(output, dtype or a.dtype)


def _refuse_integers(op: str, x: Tensor) -> None:
    if x.dtype in INTEGERS:
        refuse(op, f"it takes floats, not {x.dtype.name}", x)


def _in_dtype(output: Tensor, dtype: DataType | None) -> Tensor:
    """Converts the output to `dtype` unless it is None: torch widens mixed dtypes, and ttnn does not."""
    if dtype is None:
        return output
    return typecast(output, dtype)


def sum(
    input_tensor: Tensor,
    dim: int | Sequence[int] | None = None,
    keepdim: bool = False,
    *,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Sums over `dim`, or over all dimensions."""
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
    """Finds the `k` largest values along `dim` and their indices, which are uint32 for float32 input, else uint16.

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
    """Finds the uint32 index of the largest value along `dim`, or of all values."""
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
    """Computes exp(x) over its sum along `dim`, in float32, rounded to x's dtype. Raises DeviceError for integers."""
    if input_tensor.dtype in INTEGERS:
        refuse("softmax", f"it takes floats, not {input_tensor.dtype.name}", input_tensor)
    return unary("softmax", lambda a: torch.softmax(a, dim, dtype=torch.float32).to(a.dtype), input_tensor)
