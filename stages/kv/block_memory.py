"""The bytes of blocks in the caches of a stage's layers, read from the mesh and written to it."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from stages.backend import PADDED_USERS_PER_ROW, ttnn
from stages.options import CacheOptions

BLOCKS_AT_ONCE = 8
"""Blocks of each chip that one op writes at most; where shapes must be few, all ops write so many."""


class BlockBytes(NamedTuple):
    """What a block of a pool holds in all layers of a stage, in their order."""

    pool: int
    block: int
    record: bytes


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

    def read(self, pool: int, block: int) -> bytes:
        """Returns what a block holds."""
        begin, end = [block, 0, 0, 0], [block + 1, 1, self._options.block_size, self._width]
        return b"".join(
            [
                _to_bytes(ttnn.get_device_tensors(ttnn.slice(cache, begin, end))[pool], self._dtype)
                for cache in self._caches
            ]
        )

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
        count = BLOCKS_AT_ONCE if PADDED_USERS_PER_ROW else max(len(blocks) for blocks in by_pool.values())
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


def _to_bytes(tensor: ttnn.Tensor, dtype: torch.dtype) -> bytes:
    return ttnn.to_torch(tensor).to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
