"""Matrix products."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual name

from stages.backend.embedded.chips import on_chips, refuse, refuse_because
from stages.backend.embedded.dtype import TILE_LAYOUT, DataType, held_in
from stages.backend.embedded.memory import CoreGrid, MemoryConfig
from stages.backend.embedded.program_configs import MatmulProgramConfig, WormholeComputeKernelConfig
from stages.backend.embedded.tensor import Tensor

Product = Callable[[torch.Tensor], torch.Tensor]


def linear(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor,
    *,
    bias: Tensor | None = None,
    memory_config: MemoryConfig | None = None,
    dtype: DataType | None = None,
    program_config: MatmulProgramConfig | None = None,
    activation: str | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    core_grid: CoreGrid | None = None,
) -> Tensor:
    """x [..., T, K] times a weight [..., K, N], plus `bias` [..., 1, N], then `activation` ("silu").

    In x's dtype unless `dtype` is said; computed in float32 where either operand is held in it. Raises DeviceError
    where K differs or an operand is not in TILE layout.
    """
    output = matmul(input_tensor_a, input_tensor_b, dtype=dtype)
    if bias is not None:
        output = _plus(output, bias)
    if activation is None:
        return output
    if activation != "silu":
        refuse("linear", f"activation {activation!r} is unknown", input_tensor_a, input_tensor_b)
    return Tensor(on_chips("linear", F.silu, output), output.dtype, output.layout, output.mesh)


def matmul(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor,
    *,
    memory_config: MemoryConfig | None = None,
    dtype: DataType | None = None,
    program_config: MatmulProgramConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    core_grid: CoreGrid | None = None,
) -> Tensor:
    """[..., T, K] times [..., K, N]; leading dimensions are equal or 1. Dtypes and errors as `linear`."""
    x, weight = input_tensor_a, input_tensor_b
    if x.layout is not TILE_LAYOUT or weight.layout is not TILE_LAYOUT:
        refuse("matmul", "both operands must be in TILE layout", x, weight)
    output_dtype = dtype or x.dtype
    if len(x.shards) == 1 and x.mesh is weight.mesh and weight.shards:
        try:
            shards = [_product(x.shards[0], weight.shards[0])]
        except RuntimeError as error:
            refuse_because("matmul", error, x, weight)
    else:
        shards = on_chips("matmul", _product, x, weight)
    output = Tensor(shards, output_dtype, TILE_LAYOUT, x.mesh)
    held = held_in(output_dtype)
    if shards[0].dtype != held:
        output.shards = on_chips("matmul", lambda shard: shard.to(held), output)
    return output


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if x.dtype != weight.dtype:
        x, weight = x.float(), weight.float()
    if weight.dim() == 4 and weight.shape[0] == weight.shape[1] == 1:
        return F.linear(x, weight[0, 0].t())
    return torch.matmul(x, weight)


def _plus(output: Tensor, bias: Tensor) -> Tensor:
    shards = on_chips("linear", lambda a, b: (a + b).to(a.dtype), output, bias)
    return Tensor(shards, output.dtype, output.layout, output.mesh)
