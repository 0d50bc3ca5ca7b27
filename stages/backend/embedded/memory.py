"""Memory configs: where a chip would keep a tensor. Every op accepts one; only the cores of a sharded one are read."""

import dataclasses
import enum
import functools
from collections.abc import Sequence


class BufferType(enum.Enum):
    """ttnn's kinds of memory."""

    DRAM = 0
    L1 = 1


class TensorMemoryLayout(enum.Enum):
    """How a buffer is spread over banks or cores."""

    INTERLEAVED = 0
    HEIGHT_SHARDED = 2
    WIDTH_SHARDED = 3
    BLOCK_SHARDED = 4


class ShardStrategy(enum.Enum):
    """Which dimensions a sharded memory config splits."""

    HEIGHT = 1
    WIDTH = 2
    BLOCK = 3


class ShardOrientation(enum.Enum):
    """The order in which shards are assigned to cores."""

    ROW_MAJOR = 0
    COL_MAJOR = 1


@dataclasses.dataclass(frozen=True)
class CoreCoord:
    """A core, or the size of a grid of cores."""

    x: int
    y: int


@dataclasses.dataclass(frozen=True)
class CoreGrid:
    """The size of a grid of cores, with rows first."""

    y: int
    x: int


@dataclasses.dataclass(frozen=True)
class CoreRange:
    """A rectangle of cores, both corners included."""

    start: CoreCoord
    end: CoreCoord


@dataclasses.dataclass(frozen=True)
class CoreRangeSet:
    """A set of cores, as rectangles."""

    ranges: Sequence[CoreRange]


@dataclasses.dataclass(frozen=True)
class ShardSpec:
    """The cores of a sharded buffer and the shape of each core's part."""

    grid: CoreRangeSet | CoreGrid
    shape: Sequence[int]
    orientation: ShardOrientation = ShardOrientation.ROW_MAJOR

    @functools.cached_property
    def cores(self) -> int:
        """The number of cores."""
        if isinstance(self.grid, CoreGrid):
            return self.grid.x * self.grid.y
        return sum((one.end.x - one.start.x + 1) * (one.end.y - one.start.y + 1) for one in self.grid.ranges)


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Where and how a tensor is stored."""

    memory_layout: TensorMemoryLayout = TensorMemoryLayout.INTERLEAVED
    buffer_type: BufferType = BufferType.DRAM
    shard_spec: ShardSpec | None = None


DRAM_MEMORY_CONFIG = MemoryConfig()
L1_MEMORY_CONFIG = MemoryConfig(buffer_type=BufferType.L1)
L1_HEIGHT_SHARDED_MEMORY_CONFIG = MemoryConfig(TensorMemoryLayout.HEIGHT_SHARDED, BufferType.L1)
L1_WIDTH_SHARDED_MEMORY_CONFIG = MemoryConfig(TensorMemoryLayout.WIDTH_SHARDED, BufferType.L1)
L1_BLOCK_SHARDED_MEMORY_CONFIG = MemoryConfig(TensorMemoryLayout.BLOCK_SHARDED, BufferType.L1)

_LAYOUT_OF = {
    ShardStrategy.HEIGHT: TensorMemoryLayout.HEIGHT_SHARDED,
    ShardStrategy.WIDTH: TensorMemoryLayout.WIDTH_SHARDED,
    ShardStrategy.BLOCK: TensorMemoryLayout.BLOCK_SHARDED,
}


def create_sharded_memory_config(
    shape: Sequence[int],
    core_grid: CoreRangeSet | CoreGrid,
    strategy: ShardStrategy,
    orientation: ShardOrientation | None = None,
    use_height_and_width_as_shard_shape: bool = False,
) -> MemoryConfig:
    """Creates a memory config in L1; `shape` is one core's part if `use_height_and_width_as_shard_shape`."""
    spec = ShardSpec(core_grid, tuple(shape), orientation or ShardOrientation.ROW_MAJOR)
    return MemoryConfig(_LAYOUT_OF[strategy], BufferType.L1, spec)


def num_cores_to_corerangeset(target_num_cores: int, grid_size: CoreCoord, row_wise: bool = False) -> CoreRangeSet:
    """The first `target_num_cores` cores of a grid, in rows or in columns."""
    minor = grid_size.x if row_wise else grid_size.y
    cells = [divmod(index, minor) for index in range(target_num_cores)]
    cores = [CoreCoord(low, high) if row_wise else CoreCoord(high, low) for high, low in cells]
    return CoreRangeSet([CoreRange(core, core) for core in cores])
