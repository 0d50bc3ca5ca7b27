"""Element-wise ops."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual name

from stages.backend.embedded.chips import binary, unary
from stages.backend.embedded.dtype import DataType, held_in
from stages.backend.embedded.memory import MemoryConfig
from stages.backend.embedded.program_configs import UnaryOpType
from stages.backend.embedded.tensor import Tensor
from stages.errors import DeviceError


def add(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor | float,
    *,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """a + b, broadcast; in a's dtype unless `dtype` is said."""
    return _combined("add", torch.add, input_tensor_a, input_tensor_b, dtype)


def subtract(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor | float,
    *,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """a - b, broadcast; in a's dtype unless `dtype` is said."""
    return _combined("subtract", torch.sub, input_tensor_a, input_tensor_b, dtype)


def mul(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor | float,
    *,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
    input_tensor_a_activations: Sequence[UnaryOpType] = (),
) -> Tensor:
    """a * b, broadcast, or silu(a) * b; in a's dtype unless `dtype` is said."""
    function: Callable[..., torch.Tensor] = _silu_mul if input_tensor_a_activations else torch.mul
    return _combined("mul", function, input_tensor_a, input_tensor_b, dtype)


def div(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor | float,
    *,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """a / b, broadcast; in a's dtype unless `dtype` is said."""
    return _combined("div", torch.div, input_tensor_a, input_tensor_b, dtype)


multiply = mul
divide = div
sub = subtract


def silu(input_tensor: Tensor, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """x * sigmoid(x)."""
    return unary("silu", F.silu, input_tensor)


def sigmoid(input_tensor: Tensor, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """1 / (1 + exp(-x))."""
    return unary("sigmoid", torch.sigmoid, input_tensor)


def typecast(input_tensor: Tensor, dtype: DataType, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """The same values in another dtype; no copy where both are held alike."""
    x = input_tensor
    if not x.shards:
        raise DeviceError("typecast: a tensor was used after deallocate().")
    held = held_in(dtype)
    if x.shards[0].dtype == held:
        return Tensor(x.shards, dtype, x.layout, x.mesh)
    return Tensor(unary("typecast", lambda a: a.to(held), x).shards, dtype, x.layout, x.mesh)


def _silu_mul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.silu(a) * b


def _combined(
    op: str, function: Callable[..., torch.Tensor], a: Tensor, b: Tensor | float, dtype: DataType | None
) -> Tensor:
    if not isinstance(b, Tensor):
        return _in_dtype(unary(op, lambda x: function(x, b), a), dtype)
    output = binary(op, function, a, b)
    if dtype is None and a.dtype is b.dtype:
        return output
    return _in_dtype(output, dtype or a.dtype)


def _in_dtype(output: Tensor, dtype: DataType | None) -> Tensor:
    """torch widens where dtypes are mixed; ttnn gives what was asked for."""
    if dtype is None:
        return output
    return typecast(output, dtype)
