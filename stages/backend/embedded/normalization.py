"""RMS norm, whole on a chip, or in two halves before and after a gather of its statistics."""

import functools
import math

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual name

from stages.backend.embedded.chips import binary, on_chips, refuse, refuse_all_but_float_tiles, unary
from stages.backend.embedded.dtype import TILE_LAYOUT, TILE_SIZE, DataType, bfloat16, float32, held_in
from stages.backend.embedded.memory import MemoryConfig
from stages.backend.embedded.program_configs import (
    LayerNormShardedMultiCoreProgramConfig,
    WormholeComputeKernelConfig,
)
from stages.backend.embedded.tensor import Tensor


def rms_norm(
    input_tensor: Tensor,
    *,
    epsilon: float = 1e-12,
    weight: Tensor,
    memory_config: MemoryConfig | None = None,
    program_config: LayerNormShardedMultiCoreProgramConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Computes x [..., W] / sqrt(mean(x^2) + epsilon) * weight, in float32.

    The weight is [1, 1, 1, W] in TILE or [1, 1, W / 32, 32] in ROW_MAJOR layout. Raises DeviceError for a weight of
    another shape or width, or x in ROW_MAJOR layout or of integers.
    """
    x = input_tensor
    refuse_all_but_float_tiles("rms_norm", x)
    grown = weight.remember("grown", lambda: unary("rms_norm", _grown, _flat(weight)))
    return binary("rms_norm", lambda a, own: _rms_norm(a, own, epsilon), x, grown)


def _grown(gamma: torch.Tensor) -> torch.Tensor:
    return gamma.float() * math.sqrt(len(gamma))


def _rms_norm(x: torch.Tensor, grown: torch.Tensor, epsilon: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, where `grown` is weight * sqrt(W).

    It divides by the norm of x and sqrt(W * epsilon), as the legs of a right triangle: four operators of torch, where
    its own rms_norm calls seven, which takes almost twice as long for few rows.
    """
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).hypot_(_least_norm(len(grown), epsilon))
    return torch.mul(wide, grown).div_(norm).to(x.dtype)


@functools.cache
def _least_norm(width: int, epsilon: float) -> torch.Tensor:
    return torch.tensor(math.sqrt(width * epsilon))


def rms_norm_pre_all_gather(
    input_tensor: Tensor,
    *,
    dtype: DataType = bfloat16,
    memory_config: MemoryConfig | None = None,
    program_config: LayerNormShardedMultiCoreProgramConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Computes statistics of each chip's part of the rows: [..., 32], with the sum of squares in column 0, else zero.

    Raises DeviceError for integers, ROW_MAJOR layout, and float32 unless the kernel accumulates in float32.
    """
    x = input_tensor
    refuse_all_but_float_tiles("rms_norm_pre_all_gather", x)
    if x.dtype is float32 and (compute_kernel_config is None or not compute_kernel_config.fp32_dest_acc_en):
        refuse("rms_norm_pre_all_gather", "float32 needs a compute_kernel_config with fp32_dest_acc_en", x)
    held = held_in(dtype)

    def statistics(a: torch.Tensor) -> torch.Tensor:
        squares = a.float().square().sum(-1, keepdim=True)
        return F.pad(squares, (0, TILE_SIZE - 1)).to(held)

    return Tensor(on_chips("rms_norm_pre_all_gather", statistics, x), dtype, x.layout, x.mesh)


def rms_norm_post_all_gather(
    input_tensor: Tensor,
    stats: Tensor,
    *,
    epsilon: float = 1e-12,
    weight: Tensor,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
    program_config: LayerNormShardedMultiCoreProgramConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Normalises each chip's part with `stats` [..., 32 * chips], gathered over the chips that share the rows.

    Raises DeviceError if the statistics are not those of all chips of a mesh axis.
    """
    x = input_tensor
    refuse_all_but_float_tiles("rms_norm_post_all_gather", x, stats)
    width = x.shape[-1]
    gamma = weight.remember("gamma", lambda: _flat(weight))
    chips, rest = divmod(stats.shape[-1], TILE_SIZE)
    rows, columns = x.mesh.shape
    sharing = {rows, columns, x.mesh.size} - {1} or {1}
    if rest or chips not in sharing or stats.shape[:-1] != x.shape[:-1]:
        refuse(
            "rms_norm_post_all_gather", f"the statistics must be {TILE_SIZE} wide for each chip of an axis", x, stats
        )
    output_dtype = dtype or x.dtype
    held = held_in(output_dtype)

    def norm(a: torch.Tensor, statistics: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        mean = statistics[..., ::TILE_SIZE].float().sum(-1, keepdim=True) / (chips * width)
        return (a.float() * torch.rsqrt(mean + epsilon) * flat).to(held)

    shards = on_chips("rms_norm_post_all_gather", norm, x, stats, gamma)
    return Tensor(shards, output_dtype, x.layout, x.mesh)


def _flat(weight: Tensor) -> Tensor:
    shape = weight.shape
    width = shape[-1] if weight.layout is TILE_LAYOUT else TILE_SIZE * shape[-2]
    if shape.numel() != width or (weight.layout is not TILE_LAYOUT and len(shape) != 4):
        refuse("rms_norm", "the weight must be [1, 1, 1, W] in TILE or [1, 1, W / 32, 32] in ROW_MAJOR layout", weight)
    return unary("rms_norm", lambda shard: shard.reshape(-1).to(held_in(bfloat16)), weight)
