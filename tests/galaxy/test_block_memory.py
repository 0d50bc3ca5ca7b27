"""Blocks of R1's caches are read and written by ops that ttnn accepts, on mock Galaxies."""

import pytest
import torch
import ttnn

from stages.backend import composite
from stages.kv.block_memory import BLOCKS_AT_ONCE, BlockBytes, BlockMemory
from tests.galaxy.meshes import opened
from tests.galaxy.r1 import COLUMNS, R1, r1_cache

LAYERS = 2
WIDTH = R1.kv_lora_rank + R1.qk_rope_head_dim


@pytest.mark.parametrize("dtype", [ttnn.bfloat8_b, ttnn.bfloat16], ids=["bfloat8_b", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 4])
def test_blocks_of_r1_are_read_and_written(rows: int, dtype: ttnn.DataType) -> None:
    options = r1_cache(rows)
    with opened(rows, COLUMNS) as mesh:
        caches = [
            composite.zeroed((options.blocks + 1, 1, options.block_size, WIDTH), dtype=dtype, device=mesh)
            for _ in range(LAYERS)
        ]
        memory = BlockMemory(caches, mesh, options, torch.bfloat16)
        assert memory.record_bytes == LAYERS * options.block_size * WIDTH * 2

        for pool, block in ((0, 0), (options.pools - 1, options.blocks - 1)):
            assert len(bytes(memory.read(pool, [block])[0])) == memory.record_bytes
        record = bytes(memory.record_bytes)
        memory.write([BlockBytes(options.pools - 1, block, record) for block in range(BLOCKS_AT_ONCE + 1)])
        memory.write([BlockBytes(pool, 3, record) for pool in range(options.pools)])
        memory.write([])
        del caches, memory
