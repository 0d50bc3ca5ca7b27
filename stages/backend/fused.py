"""Programs of chips that do what several ops would: products of gathered inputs, and norms with their residual.

Each of them exchanges values with other chips, which takes semaphores, and buffers that lie at the same addresses on
all chips for as long as the mesh is open: a neighbour may write there before a chip has come to the op itself.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from stages.backend import ttnn
from stages.tensor_dtypes import TILE
from stages.wormhole import GALAXY_COLUMNS, LINKS

if TYPE_CHECKING:
    from stages.backend.embedded.fused import GlobalSemaphore

Semaphores: TypeAlias = "list[GlobalSemaphore]"
"""Counters by which the chips of one op wait for each other; ttnn has no public name for their type."""

COLUMNS = 1
"""The mesh axis that shares out the values of hidden states."""

GRID = ttnn.CoreCoord(8, 8)
"""Cores of a Wormhole chip that a program may use."""

BLOCK_TILES = 8
"""Tiles of the inner dimension that a product takes at a time, at most."""

ROWS_AT_ONCE = TILE
"""Tokens that a norm with its residual takes: one tile of rows."""


def semaphores(mesh_device: ttnn.MeshDevice) -> Semaphores:
    """The pair of semaphores of one `gathered_linear`; none on an axis of one chip, which has nothing to gather."""
    if mesh_device.shape[COLUMNS] == 1:
        return []
    return [ttnn.create_global_semaphore(mesh_device, _cores(GRID.x, GRID.y), 0) for _ in range(2)]


def gathered_linear(
    x: ttnn.Tensor,
    own_semaphores: Semaphores,
    *,
    input_tensor_b: ttnn.Tensor,
    chunk_sizes: Sequence[int] = (),
    fuse_swiglu: bool = False,
    memory_config: ttnn.MemoryConfig | None = None,
    compute_kernel_config: ttnn.WormholeComputeKernelConfig | None = None,
) -> list[ttnn.Tensor]:
    """Gathers the columns of x [1, 1, T, K / columns] and multiplies them by a weight [1, 1, K, N] of each chip.

    Returns [1, 1, T, N], or its parts of `chunk_sizes` columns, or with `fuse_swiglu` [1, 1, T, N / 2], for which the
    weight has pairs of tiles, a gate's and then those that go up. One program on chips that share the columns.
    """
    if not own_semaphores:
        return _local_linear(x, input_tensor_b, chunk_sizes, fuse_swiglu, memory_config, compute_kernel_config)
    inner = x.shape[3] // TILE
    return ttnn.experimental.all_gather_minimal_matmul_async(
        x,
        input_tensor_b,
        config=ttnn.MinimalMatmulConfig(
            M_block_size=1,
            K_block_size=next(size for size in range(BLOCK_TILES, 0, -1) if inner % size == 0),
            N_block_size=2,
            subblock_h=1,
            subblock_w=2,
            compute_with_storage_grid_size=GRID,
        ),
        multi_device_global_semaphore=own_semaphores,
        topology=ttnn.Topology.Linear,
        cluster_axis=COLUMNS,
        num_links=LINKS,
        # All cores of a column send what they gather, a link's workers together.
        num_workers_per_link=GRID.y // LINKS,
        memory_config=memory_config,
        compute_kernel_config=compute_kernel_config,
        chunks=max(1, len(chunk_sizes)),
        chunk_sizes=list(chunk_sizes),
        fuse_swiglu=fuse_swiglu,
    )


def _local_linear(
    x: ttnn.Tensor,
    weight: ttnn.Tensor,
    chunk_sizes: Sequence[int],
    fuse_swiglu: bool,
    memory_config: ttnn.MemoryConfig | None,
    compute_kernel_config: ttnn.WormholeComputeKernelConfig | None,
) -> list[ttnn.Tensor]:
    if fuse_swiglu:
        product = ttnn.experimental.minimal_matmul(
            x, weight, fuse_swiglu=True, memory_config=memory_config, compute_kernel_config=compute_kernel_config
        )
        return [product]
    product = ttnn.linear(x, weight, memory_config=memory_config, compute_kernel_config=compute_kernel_config)
    if not chunk_sizes:
        return [product]
    ends = [sum(chunk_sizes[: index + 1]) for index in range(len(chunk_sizes))]
    return [
        ttnn.slice(product, [0, 0, 0, end - size], [1, 1, product.shape[2], end])
        for size, end in zip(chunk_sizes, ends, strict=True)
    ]


class NormBuffers(NamedTuple):
    """What one `residual_norm` of a layer takes of the mesh: where statistics arrive, and how chips wait for them.

    `memory_config` is that of hidden states and residual, spread over cores by columns.
    """

    memory_config: ttnn.MemoryConfig
    program_config: ttnn.LayerNormShardedMultiCoreProgramConfig
    stats: ttnn.Tensor
    semaphore: "GlobalSemaphore"

    @classmethod
    def on(cls, mesh_device: ttnn.MeshDevice, hidden_size: int) -> "NormBuffers | None":
        """Makes the buffers of one norm; None on one column, or where columns do not share whole tiles."""
        columns = mesh_device.shape[COLUMNS]
        # By the whole row of a Galaxy, for which weights are laid out.
        if columns == 1 or hidden_size % (TILE * max(columns, GALAXY_COLUMNS)):
            return None
        tiles = hidden_size // (columns * TILE)
        width, height = _rectangle(tiles)
        each = tiles // (width * height)
        cores = _cores(width, height)
        return cls(
            _by_columns(cores, each * TILE),
            ttnn.LayerNormShardedMultiCoreProgramConfig(
                compute_with_storage_grid_size=(width, height), subblock_w=1, block_h=1, block_w=each, inplace=False
            ),
            ttnn.empty(
                (1, 1, TILE, TILE * columns),
                dtype=ttnn.bfloat16,
                layout=ttnn.TILE_LAYOUT,
                device=mesh_device,
                memory_config=_by_columns(_cores(1, 1), TILE * columns),
            ),
            ttnn.create_global_semaphore(mesh_device, cores, 0),
        )


def residual_norm(
    x: ttnn.Tensor,
    buffers: NormBuffers,
    *,
    epsilon: float,
    weight: ttnn.Tensor,
    residual: ttnn.Tensor | None = None,
) -> ttnn.Tensor:
    """Normalises x [1, 1, T, hidden / columns], of at most ROWS_AT_ONCE tokens, plus `residual`, which becomes the sum.

    Both lie as `buffers.memory_config` says, and so does the result; `weight` is [1, 1, hidden / columns / 32, 32].
    """
    return ttnn.fused_rms_minimal(
        x,
        buffers.program_config,
        COLUMNS,
        x.device(),
        buffers.semaphore,
        topology=ttnn.Topology.Linear,
        memory_config=buffers.memory_config,
        residual_input_tensor=residual,
        epsilon=epsilon,
        weight=weight,
        stats=buffers.stats,
    )


def _rectangle(tiles: int) -> tuple[int, int]:
    """The widest and then highest rectangle of cores that shares `tiles` evenly."""
    sizes = [
        (width, height)
        for width in range(1, GRID.x + 1)
        for height in range(1, GRID.y + 1)
        if tiles % (width * height) == 0
    ]
    return max(sizes, key=lambda size: (size[0] * size[1], size[0]))


def _cores(width: int, height: int) -> ttnn.CoreRangeSet:
    return ttnn.CoreRangeSet([ttnn.CoreRange(ttnn.CoreCoord(0, 0), ttnn.CoreCoord(width - 1, height - 1))])


def _by_columns(cores: ttnn.CoreRangeSet, width: int) -> ttnn.MemoryConfig:
    return ttnn.create_sharded_memory_config(
        (ROWS_AT_ONCE, width),
        core_grid=cores,
        strategy=ttnn.ShardStrategy.WIDTH,
        use_height_and_width_as_shard_shape=True,
    )
