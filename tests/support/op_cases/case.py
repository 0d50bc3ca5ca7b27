"""A case: one call of an op that is made on the embedded device and on a mock Galaxy."""

import dataclasses
from collections.abc import Callable

from stages.backend import ttnn

ONE_ROW = (1, 8)
ALL_ROWS = (4, 8)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op: `call` creates operands on an open mesh and calls `op`, which is named as under `ttnn`.

    `differs` has the reason why the two devices need not agree, for the few cases where they do not.
    """

    op: str
    name: str
    call: Callable[[ttnn.MeshDevice], object]
    mesh: tuple[int, int] = ONE_ROW
    differs: str = ""


def tiles(mesh: ttnn.MeshDevice, *shape: int, dtype: ttnn.DataType = ttnn.bfloat16) -> ttnn.Tensor:
    """Allocates `shape` on each chip in TILE layout."""
    return ttnn.empty(shape, dtype=dtype, layout=ttnn.TILE_LAYOUT, device=mesh)


def rows(mesh: ttnn.MeshDevice, *shape: int, dtype: ttnn.DataType = ttnn.bfloat16) -> ttnn.Tensor:
    """Allocates `shape` on each chip in ROW_MAJOR layout."""
    return ttnn.empty(shape, dtype=dtype, layout=ttnn.ROW_MAJOR_LAYOUT, device=mesh)


def zeros(mesh: ttnn.MeshDevice, *shape: int, dtype: ttnn.DataType = ttnn.int32) -> ttnn.Tensor:
    """Creates zeros in ROW_MAJOR layout, which are valid ids, positions and pages."""
    return ttnn.zeros(shape, dtype=dtype, layout=ttnn.ROW_MAJOR_LAYOUT, device=mesh)


def user_cores(users: int, width: int) -> ttnn.MemoryConfig:
    """A memory config with one core for each user, like that of the batch builder."""
    return ttnn.create_sharded_memory_config(
        (ttnn.TILE_SIZE, width),
        core_grid=ttnn.num_cores_to_corerangeset(users, ttnn.CoreCoord(8, 8), row_wise=True),
        strategy=ttnn.ShardStrategy.HEIGHT,
        use_height_and_width_as_shard_shape=True,
    )
