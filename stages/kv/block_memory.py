"""The bytes of blocks in the caches of a stage's layers, read from the mesh and written to it."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stages.backend import PADDED_USERS_PER_ROW, ttnn
from stages.kv.record_file import Record
from stages.options import CacheOptions

BLOCKS_AT_ONCE = 8
"""Blocks of each chip that one op writes at most; where shapes must be few, an op writes so many or a single one."""


class BlockBytes(NamedTuple):
    """What a block of a pool holds in all layers of a stage, in their order."""

    pool: int
    block: int
    record: Record


class BlockMemory:
    """The KV caches of a stage's layers, [blocks + 1, 1, block_size, width] on each chip, whose chip is the pool."""

    def __init__(
        self, caches: Sequence[ttnn.Tensor], mesh_device: ttnn.MeshDevice, options: CacheOptions, dtype: torch.dtype
    ) -> None:
        """`dtype` is that of values in records: one that holds all values of the caches exactly."""
        self._caches = caches
        self._mesh_device = mesh_device
        self._options = options
        self._dtype = dtype
        self._width = int(caches[0].shape[-1]) if caches else 0

    @property
    def record_bytes(self) -> int:
        """The bytes of a block in all layers."""
        return len(self._caches) * self._options.block_size * self._width * self._dtype.itemsize

    def read(self, pool: int, blocks: Sequence[int]) -> list[Record]:
        """Returns what blocks hold; neighbours are read together."""
        records: list[Record] = []
        for first, count in _runs(blocks):
            ends = [first, 0, 0, 0], [first + count, 1, self._options.block_size, self._width]
            layers = [
                _to_bytes(ttnn.get_device_tensors(ttnn.slice(cache, *ends))[pool], self._dtype)
                for cache in self._caches
            ]
            if count == 1:
                records.append(b"".join([layer.data for layer in layers]))
                continue
            # By numpy, as torch would wake up all of its threads for so little.
            held = np.stack(layers, axis=1).reshape(-1).data
            size = self.record_bytes
            records += [held[begin : begin + size] for begin in range(0, count * size, size)]
        return records

    def write(self, blocks: Iterable[BlockBytes]) -> None:
        """Writes blocks: some of each pool by one op a layer, and scratch blocks where a pool has fewer."""
        by_pool: dict[int, list[BlockBytes]] = defaultdict(list)
        for each in blocks:
            by_pool[each.pool].append(each)
        most = max((len(of_pool) for of_pool in by_pool.values()), default=0)
        for begin in range(0, most, BLOCKS_AT_ONCE):
            self._write({pool: of_pool[begin : begin + BLOCKS_AT_ONCE] for pool, of_pool in by_pool.items()})

    def _write(self, by_pool: dict[int, list[BlockBytes]]) -> None:
        options, layers = self._options, len(self._caches)
        most = max(len(blocks) for blocks in by_pool.values())
        count = BLOCKS_AT_ONCE if PADDED_USERS_PER_ROW and most > 1 else most
        pages = torch.full((options.pools, count), options.blocks, dtype=torch.int32)
        shape = (layers, options.pools, 1, count * options.block_size, self._width)
        # torch.zeros would wake up all of torch's threads.
        zeros = bytearray(math.prod(shape) * self._dtype.itemsize)
        values = torch.frombuffer(zeros, dtype=self._dtype).view(shape)
        for pool, blocks in by_pool.items():
            for index, (_, block, record) in enumerate(blocks):
                pages[pool, index] = block
                own = torch.frombuffer(bytearray(record), dtype=self._dtype)
                at = slice(index * options.block_size, (index + 1) * options.block_size)
                values[:, pool, 0, at] = own.view(layers, options.block_size, self._width)
        mapper = ttnn.ShardTensorToMesh(self._mesh_device, dim=0)
        table = ttnn.from_torch(
            pages, dtype=ttnn.int32, layout=ttnn.ROW_MAJOR_LAYOUT, device=self._mesh_device, mesh_mapper=mapper
        )
        for cache, of_layer in zip(self._caches, values, strict=True):
            filling = ttnn.from_torch(
                of_layer, dtype=cache.dtype, layout=ttnn.TILE_LAYOUT, device=self._mesh_device, mesh_mapper=mapper
            )
            ttnn.experimental.paged_fill_cache(cache, filling, table, batch_idx=0)


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first block and length of each run of neighbours; on chips, whose shapes are few, each block is a run."""
    begin = 0
    for end in range(1, len(blocks) + 1):
        if end == len(blocks) or blocks[end] != blocks[end - 1] + 1 or PADDED_USERS_PER_ROW:
            yield blocks[begin], end - begin
            begin = end


def _to_bytes(tensor: ttnn.Tensor, dtype: torch.dtype) -> npt.NDArray[np.uint8]:
    """[blocks, 1, block_size, width] as bytes [blocks, 1, block_size, width * itemsize]."""
    values = ttnn.to_torch(tensor)
    array: npt.NDArray[np.uint8] = (values if values.dtype is dtype else values.to(dtype)).view(torch.uint8).numpy()
    return array
