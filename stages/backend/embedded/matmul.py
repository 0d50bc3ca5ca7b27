"""Matrix products."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual name

from stages.backend.embedded.chips import on_chips, refuse, refuse_all_but_float_tiles, refuse_because
from stages.backend.embedded.dtype import TILE_LAYOUT, DataType, held_in
from stages.backend.embedded.matrix import Matrix
from stages.backend.embedded.memory import CoreGrid, MemoryConfig
from stages.backend.embedded.processor import widened
from stages.backend.embedded.program_configs import MatmulProgramConfig, WormholeComputeKernelConfig
from stages.backend.embedded.tensor import Tensor


def linear(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor,
    *,
    memory_config: MemoryConfig | None = None,
    dtype: DataType | None = None,
    program_config: MatmulProgramConfig | None = None,
    activation: str | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    core_grid: CoreGrid | None = None,
) -> Tensor:
    """x [..., T, K] times a weight [..., K, N], then `activation` ("silu").

    In x's dtype unless `dtype` is said; computed in float32 where either operand is held in it. Raises DeviceError
    where K differs, or an operand is not in TILE layout or holds integers.
    """
    x, weight = input_tensor_a, input_tensor_b
    if activation is not None and activation != "silu":
        refuse("linear", f"activation {activation!r} is unknown", x, weight)
    refuse_all_but_float_tiles("linear", x, weight)
    matrices = weight.remember("matrices", lambda: _matrices(weight))
    output = _converted(_by_matrices(x, weight, matrices), dtype) if matrices else matmul(x, weight, dtype=dtype)
    if activation is None:
        return output
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
    x, y = input_tensor_a, input_tensor_b
    refuse_all_but_float_tiles("matmul", x, y)
    return _converted(Tensor(on_chips("matmul", _product, x, y), x.dtype, TILE_LAYOUT, x.mesh), dtype)


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if x.dtype != y.dtype:
        x, y = x.float(), y.float()
    held = x.dtype
    rows = x.shape[-2]
    x, y = widened(x, rows), widened(y, rows)
    if y.dim() == 4 and y.shape[0] == y.shape[1] == 1:
        return F.linear(x, y[0, 0].t()).to(held)
    return torch.matmul(x, y).to(held)


def _matrices(weight: Tensor) -> list[Matrix]:
    """One matrix a chip; none where the weight has a batch of them. Shards that alias share theirs."""
    if weight.shape[:-2].numel() != 1:
        return []
    made = {id(shard): Matrix(shard.view(shard.shape[-2:]).t()) for shard in weight.shards}
    return [made[id(shard)] for shard in weight.shards]


def _by_matrices(x: Tensor, weight: Tensor, matrices: list[Matrix]) -> Tensor:
    try:
        if len(x.shards) == 1 and x.mesh is weight.mesh:
            return Tensor([matrices[0].times(x.shards[0])], x.dtype, TILE_LAYOUT, x.mesh)
        by_shard = {id(shard): matrix for shard, matrix in zip(weight.shards, matrices, strict=True)}
        shards = on_chips("linear", lambda a, shard: by_shard[id(shard)].times(a), x, weight)
    except RuntimeError as error:
        refuse_because("linear", error, x, weight)
    return Tensor(shards, x.dtype, TILE_LAYOUT, x.mesh)


def _converted(output: Tensor, dtype: DataType | None) -> Tensor:
    """In `dtype`, or in the one it says it has: a product with float32 comes out wider."""
    if dtype is not None:
        output.dtype = dtype
    held = held_in(output.dtype)
    if output.shards[0].dtype != held:
        output.shards = on_chips("linear", lambda shard: shard.to(held), output)
    return output
