"""Blocks that are read from a mesh and written to it, beside all others."""

from collections.abc import Iterator

import pytest
import torch

from stages.backend import ttnn
from stages.kv import block_memory
from stages.kv.block_memory import BLOCKS_AT_ONCE, BlockBytes, BlockMemory
from tests.support.embedded_meshes import on_mesh_shapes
from tests.support.kv_blocks import contents, floats_held_in, options_for, random_caches

LAYERS = 3

on_meshes = on_mesh_shapes([(1, 1), (1, 8), (2, 8)])


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.manual_seed(0)
    with floats_held_in(request.param):
        yield request.param


@pytest.mark.parametrize("kept", [ttnn.bfloat16, ttnn.bfloat8_b], ids=["cache-bfloat16", "cache-bfloat8_b"])
@on_meshes
def test_a_block_is_read_as_it_is(mesh: ttnn.MeshDevice, kept: ttnn.DataType, dtype: torch.dtype) -> None:
    caches = random_caches(mesh, LAYERS, kept)
    options = options_for(mesh)
    memory = BlockMemory(caches, mesh, options, dtype)
    values = contents(caches)
    for pool, block in ((0, 0), (options.pools - 1, options.blocks - 1), (options.pools // 2, 3)):
        record = bytes(memory.read(pool, [block])[0])
        assert len(record) == memory.record_bytes
        found = torch.frombuffer(bytearray(record), dtype=dtype).view(LAYERS, options.block_size, -1)
        assert torch.equal(found, values[:, pool, block].to(dtype))


@pytest.mark.parametrize("padded", [0, 32], ids=["as-many-as-needed", "as-on-chips"])
@pytest.mark.parametrize("kept", [ttnn.bfloat16, ttnn.bfloat8_b], ids=["cache-bfloat16", "cache-bfloat8_b"])
@on_meshes
def test_blocks_of_several_pools_come_back_and_no_others_change(
    mesh: ttnn.MeshDevice, kept: ttnn.DataType, padded: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_memory, "PADDED_USERS_PER_ROW", padded)
    options = options_for(mesh)
    source, caches = random_caches(mesh, LAYERS, kept), random_caches(mesh, LAYERS, kept)
    reader, memory = (BlockMemory(each, mesh, options, dtype) for each in (source, caches))
    wanted, expected = contents(source), contents(caches)
    last = options.pools - 1
    moved = {(0, 5): (last, 2), (0, 1): (0, 7), (last, 0): (last, 0), (last // 2, 6): (0, 3)}
    blocks = []
    for (pool, block), (from_pool, from_block) in moved.items():
        blocks.append(BlockBytes(pool, block, bytes(reader.read(from_pool, [from_block])[0])))
        expected[:, pool, block] = wanted[:, from_pool, from_block]
    memory.write(blocks)
    assert torch.equal(contents(caches)[:, :, : options.blocks], expected[:, :, : options.blocks])
    assert bytes(memory.read(0, [5])[0]) == bytes(reader.read(last, [2])[0])


@on_meshes
def test_more_blocks_of_a_pool_than_one_op_writes(mesh: ttnn.MeshDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_memory, "BLOCKS_AT_ONCE", 3)
    assert BLOCKS_AT_ONCE > 3
    with floats_held_in(torch.float32):
        options = options_for(mesh)
        source, caches = random_caches(mesh, 1), random_caches(mesh, 1)
        reader, memory = (BlockMemory(each, mesh, options, torch.float32) for each in (source, caches))
        last = options.pools - 1
        moved = [(0, block) for block in range(options.blocks)] + [(last, block) for block in (1, 4)] * (last > 0)
        expected = contents(caches)
        for pool, block in moved:
            expected[:, pool, block] = contents(source)[:, pool, block]
        memory.write(BlockBytes(pool, block, bytes(reader.read(pool, [block])[0])) for pool, block in moved)
        assert torch.equal(contents(caches)[:, :, : options.blocks], expected[:, :, : options.blocks])


@on_meshes
def test_nothing_to_write_writes_nothing(mesh: ttnn.MeshDevice) -> None:
    caches = random_caches(mesh, 1)
    before = contents(caches)
    BlockMemory(caches, mesh, options_for(mesh), torch.float32).write([])
    assert torch.equal(contents(caches), before)


def test_a_stage_without_layers_has_empty_blocks() -> None:
    mesh = ttnn.open_mesh_device(ttnn.MeshShape(1, 1))
    memory = BlockMemory([], mesh, options_for(mesh), torch.float32)
    assert memory.record_bytes == 0
    ttnn.close_mesh_device(mesh)
