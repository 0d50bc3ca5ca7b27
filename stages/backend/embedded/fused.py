"""Ops that ttnn runs as one program and that are several here: products with collectives, heads, distributed norms."""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual name

from stages.backend.embedded.chips import refuse, refuse_all_but_float_tiles, refuse_all_but_tiles, unary
from stages.backend.embedded.collectives import all_gather
from stages.backend.embedded.data_movement import split
from stages.backend.embedded.dtype import BLOCK_FLOATS, ROW_MAJOR_LAYOUT, TILE_LAYOUT, TILE_SIZE, DataType, bfloat16
from stages.backend.embedded.eltwise import add
from stages.backend.embedded.memory import CoreCoord, CoreRangeSet, MemoryConfig
from stages.backend.embedded.mesh import MeshDevice
from stages.backend.embedded.normalization import rms_norm_post_all_gather, rms_norm_pre_all_gather
from stages.backend.embedded.products import linear
from stages.backend.embedded.program_configs import (
    LayerNormShardedMultiCoreProgramConfig,
    Topology,
    WormholeComputeKernelConfig,
)
from stages.backend.embedded.tensor import Tensor

__all__ = [
    "all_gather_minimal_matmul_async",
    "minimal_matmul",
    "nlp_concat_heads",
    "nlp_create_q_heads_split",
]


@dataclasses.dataclass(frozen=True)
class GlobalSemaphore:
    """A counter at the same address of some cores of every chip, by which they wait for each other."""

    cores: CoreRangeSet
    initial_value: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinimalMatmulConfig:
    """The blocks of a minimal matmul, in tiles."""

    M_block_size: int
    K_block_size: int
    N_block_size: int
    subblock_h: int
    subblock_w: int
    compute_with_storage_grid_size: CoreCoord


def create_global_semaphore(mesh_device: MeshDevice, cores: CoreRangeSet, initial_value: int) -> GlobalSemaphore:
    """Creates a counter on every chip, which nobody reads here."""
    return GlobalSemaphore(cores, initial_value)


def minimal_matmul(
    input_tensor: Tensor,
    weight_tensor: Tensor,
    *,
    config: MinimalMatmulConfig | None = None,
    memory_config: MemoryConfig | None = None,
    dtype: DataType | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    fuse_swiglu: bool = False,
) -> Tensor:
    """Multiplies x [..., M, K] by a weight [1, 1, K, N]: [..., M, N], or with `fuse_swiglu` [..., M, N / 2].

    Columns of such a weight are pairs of tiles, a gate's and then those that go up: silu(gate) * up is what remains of
    a pair. Raises DeviceError for a weight of several matrices, or columns that do not pair tiles.
    """
    x, weight = input_tensor, weight_tensor
    refuse_all_but_float_tiles("minimal_matmul", x, weight)
    if weight.shape[:-2].numel() != 1:
        refuse("minimal_matmul", "the weight must be one matrix", x, weight)
    if fuse_swiglu and weight.shape[-1] % (2 * TILE_SIZE):
        refuse("minimal_matmul", f"its columns must be pairs of tiles of {TILE_SIZE}", x, weight)
    product = linear(x, weight, dtype=dtype or x.dtype)
    return unary("minimal_matmul", _swiglu, product) if fuse_swiglu else product


def _swiglu(pairs: torch.Tensor) -> torch.Tensor:
    tiles = pairs.view(*pairs.shape[:-1], -1, 2, TILE_SIZE)
    return F.silu(tiles[..., 0, :]).mul_(tiles[..., 1, :]).flatten(-2)


def all_gather_minimal_matmul_async(
    input_tensor: Tensor,
    weight_tensor: Tensor,
    *,
    config: MinimalMatmulConfig | None = None,
    multi_device_global_semaphore: Sequence[GlobalSemaphore],
    topology: Topology = Topology.Ring,
    cluster_axis: int,
    num_links: int = 1,
    num_workers_per_link: int = 1,
    memory_config: MemoryConfig | None = None,
    dtype: DataType | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    chunks: int = 1,
    chunk_sizes: Sequence[int] = (),
    fuse_swiglu: bool = False,
) -> list[Tensor]:
    """Gathers the columns of x [..., M, K / chips] over an axis and multiplies them as `minimal_matmul` does.

    Returns the product, or its columns in parts of `chunk_sizes`. Raises DeviceError as `all_gather` and
    `minimal_matmul` do, and where the parts are not the whole.
    """
    op = "all_gather_minimal_matmul_async"
    if chunks != max(1, len(chunk_sizes)) or (chunk_sizes and sum(chunk_sizes) != weight_tensor.shape[-1]):
        refuse(op, f"{chunks} parts of {list(chunk_sizes)} are not all columns", input_tensor, weight_tensor)
    whole = all_gather(input_tensor, 3, cluster_axis=cluster_axis)
    product = minimal_matmul(whole, weight_tensor, dtype=dtype, fuse_swiglu=fuse_swiglu)
    return split(product, list(chunk_sizes), 3) if chunk_sizes else [product]


def nlp_create_q_heads_split(
    input: Tensor, *, num_heads: int, split_head_dim: int, memory_config: MemoryConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Takes x [1, 1, T, heads * d] to heads [1, heads, T, d], cut before value `split_head_dim` of each.

    Raises DeviceError where the heads do not share the columns evenly, or are not cut into whole tiles.
    """
    op = "nlp_create_q_heads_split"
    refuse_all_but_tiles(op, input)
    shape = input.shape
    width, rest = divmod(shape[-1], num_heads)
    if len(shape) != 4 or shape[1] != 1 or rest:
        refuse(op, f"x must be [1, 1, T, {num_heads} heads * d]", input)
    if not 0 < split_head_dim < width or split_head_dim % TILE_SIZE or width % TILE_SIZE:
        refuse(op, f"heads of {width} values cannot be cut before value {split_head_dim}", input)
    heads = unary(op, lambda a: a.view(shape[0], shape[2], num_heads, width).transpose(1, 2), input)
    first, second = split(heads, [split_head_dim, width - split_head_dim], 3)
    return first, second


def nlp_concat_heads(input: Tensor, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Takes heads [1, heads, T, d] to [1, 1, T, heads * d]. Raises DeviceError for other shapes and layouts."""
    refuse_all_but_tiles("nlp_concat_heads", input)
    shape = input.shape
    if len(shape) != 4:
        refuse("nlp_concat_heads", "x must be [1, heads, T, d]", input)
    return unary(
        "nlp_concat_heads", lambda a: a.transpose(1, 2).reshape(shape[0], 1, shape[2], shape[1] * shape[3]), input
    )


def fused_rms_minimal(
    input_tensor: Tensor,
    program_config: LayerNormShardedMultiCoreProgramConfig,
    cluster_axis: int,
    mesh_device: MeshDevice,
    global_semaphore: GlobalSemaphore,
    *,
    topology: Topology = Topology.Linear,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    residual_input_tensor: Tensor | None = None,
    epsilon: float = 1e-12,
    weight: Tensor,
    stats: Tensor,
) -> Tensor:
    """Normalises x [1, 1, M, W], rows that the chips of an axis share, after adding a residual of the same shape.

    The residual becomes the sum: on chips it is written over. At most one tile of rows, the weight [1, 1, W / 32, 32]
    in ROW_MAJOR layout, and `stats` [1, 1, 32, 32 * chips], where chips gather their statistics. Raises DeviceError for
    other shapes and layouts.
    """
    op, x, residual = "fused_rms_minimal", input_tensor, residual_input_tensor
    refuse_all_but_float_tiles(op, x)
    if x.shape[:2] != (1, 1) or x.shape[2] > TILE_SIZE or x.shape[3] % TILE_SIZE:
        refuse(op, f"x must be [1, 1, M, W] of at most {TILE_SIZE} rows and whole tiles of columns", x)
    if weight.layout is not ROW_MAJOR_LAYOUT or weight.shape[-1] != TILE_SIZE:
        refuse(op, "the weight must be [1, 1, W / 32, 32] in ROW_MAJOR layout", x, weight)
    if stats.shape[-1] != TILE_SIZE * mesh_device.shape[cluster_axis] or stats.layout is not TILE_LAYOUT:
        refuse(op, "the statistics must have a tile for each chip of the axis", x, stats)
    if residual is not None:
        if residual.shape != x.shape or residual.dtype is not x.dtype or x.dtype in BLOCK_FLOATS:
            refuse(op, "the residual must have the shape and dtype of x", x, residual)
        x = add(x, residual)
        residual.shards = list(x.shards)
        residual.forget_derived()
    gathered = all_gather(rms_norm_pre_all_gather(x, dtype=bfloat16), 3, cluster_axis=cluster_axis)
    return rms_norm_post_all_gather(x, gathered, epsilon=epsilon, weight=weight)
