"""Cases of tensors that move between the host and a mesh."""

import tempfile
from pathlib import Path

import torch

from stages.backend import ttnn
from tests.support.op_cases.case import ALL_ROWS, Case, rows, tiles, zeros


def put(
    mesh: ttnn.MeshDevice,
    shape: tuple[int, ...],
    dims: tuple[int | None, int | None],
    dtype: ttnn.DataType = ttnn.bfloat16,
    layout: ttnn.Layout = ttnn.TILE_LAYOUT,
) -> ttnn.Tensor:
    """Distributes zeros of the host along `dims` by the mesh's axes."""
    mapper = ttnn.ShardTensor2dMesh(mesh, tuple(mesh.shape), dims)
    return ttnn.from_torch(torch.zeros(shape), dtype, layout=layout, device=mesh, mesh_mapper=mapper)


def flat(mesh: ttnn.MeshDevice, shape: tuple[int, ...], dim: int) -> ttnn.Tensor:
    """Distributes zeros of the host along `dim` over all chips."""
    mapper = ttnn.ShardTensorToMesh(mesh, dim=dim)
    return ttnn.from_torch(torch.zeros(shape), ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=mesh, mesh_mapper=mapper)


def reloaded(mesh: ttnn.MeshDevice, name: str = "weight.tensorbin") -> ttnn.Tensor:
    """Writes a tensor to a file and loads it again, as is done with weights."""
    host = ttnn.from_torch(
        torch.zeros(1, 1, 64, 512),
        ttnn.bfloat4_b,
        layout=ttnn.TILE_LAYOUT,
        mesh_mapper=ttnn.ShardTensor2dMesh(mesh, tuple(mesh.shape), (None, 3)),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / name)
        ttnn.dump_tensor(path, host)
        return ttnn.load_tensor(path, device=mesh)


def as_tensor(
    mesh: ttnn.MeshDevice,
    layout: ttnn.Layout,
    width: int = 512,
    memory_config: ttnn.MemoryConfig | None = ttnn.DRAM_MEMORY_CONFIG,
) -> ttnn.Tensor:
    """Splits a weight by columns."""
    return ttnn.as_tensor(
        torch.zeros(1, 1, 64, width),
        ttnn.bfloat8_b,
        layout=layout,
        device=mesh,
        memory_config=memory_config,
        mesh_mapper=ttnn.ShardTensor2dMesh(mesh, tuple(mesh.shape), (None, 3)),
    )


def filled(tensor: ttnn.Tensor) -> ttnn.Tensor:
    """Empties a cache, in place."""
    return ttnn.fill(tensor, 0.0, output_tensor=tensor)


def of_no_file(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    """A tensor that was never written."""
    with tempfile.TemporaryDirectory() as folder:
        return ttnn.load_tensor(str(Path(folder) / "weight.tensorbin"), device=mesh)


def written(source: ttnn.Tensor, target: ttnn.Tensor) -> ttnn.Tensor:
    """Copies inputs, as a trace does."""
    ttnn.copy(source, target)
    return target


CASES = [
    Case("from_torch", "hidden states", lambda m: put(m, (1, 1, 128, 512), (2, 3)), ALL_ROWS),
    Case("from_torch", "a weight's columns", lambda m: put(m, (1, 1, 64, 512), (None, 3), ttnn.bfloat8_b)),
    Case("from_torch", "the same for all", lambda m: put(m, (1, 1, 64, 512), (None, None), ttnn.float32)),
    Case("from_torch", "ids of a row", lambda m: put(m, (1, 32), (1, None), ttnn.uint32, ttnn.ROW_MAJOR_LAYOUT)),
    Case("from_torch", "experts", lambda m: flat(m, (1, 64, 32, 32), 1), ALL_ROWS),
    Case("from_torch", "counted from the end", lambda m: flat(m, (1, 1, 32, 64), -1)),
    Case(
        "from_torch",
        "replicated",
        lambda m: ttnn.from_torch(
            torch.zeros(32, 64), ttnn.bfloat16, device=m, mesh_mapper=ttnn.ReplicateTensorToMesh(m)
        ),
    ),
    Case("from_torch", "dtype not said", lambda m: ttnn.from_torch(torch.zeros(32, 64), device=m)),
    Case(
        "from_torch",
        "bfloat8_b, layout not said",
        lambda m: ttnn.from_torch(torch.zeros(32, 64), ttnn.bfloat8_b, device=m),
    ),
    Case(
        "from_torch",
        "bfloat8_b in ROW_MAJOR",
        lambda m: put(m, (32, 64), (None, None), ttnn.bfloat8_b, ttnn.ROW_MAJOR_LAYOUT),
    ),
    Case("from_torch", "an uneven part", lambda m: put(m, (1, 1, 32, 500), (None, 3))),
    Case("from_torch", "an uneven part of experts", lambda m: flat(m, (1, 60, 32, 32), 1)),
    Case(
        "from_torch",
        "fewer experts than chips",
        lambda m: flat(m, (1, 4, 32, 32), 1),
        differs="ttnn leaves chips without a part",
    ),
    Case("from_torch", "dimension out of range", lambda m: put(m, (1, 1, 32, 512), (None, 4))),
    Case(
        "from_torch",
        "a mapper for another mesh",
        lambda m: ttnn.from_torch(
            torch.zeros(1, 1, 32, 64), device=m, mesh_mapper=ttnn.ShardTensor2dMesh(m, (2, 8), (2, 3))
        ),
    ),
    Case("empty", "dtype not said", lambda m: ttnn.empty((9, 1, 32, 64), device=m)),
    Case("empty", "bfloat8_b, layout not said", lambda m: ttnn.empty((9, 1, 32, 64), dtype=ttnn.bfloat8_b, device=m)),
    Case("empty", "in TILE", lambda m: tiles(m, 9, 1, 32, 64, dtype=ttnn.bfloat8_b)),
    Case("empty", "bfloat8_b in ROW_MAJOR", lambda m: rows(m, 9, 1, 32, 64, dtype=ttnn.bfloat8_b)),
    Case(
        "zeros",
        "a cache",
        lambda m: ttnn.zeros((9, 1, 32, 576), dtype=ttnn.bfloat8_b, layout=ttnn.TILE_LAYOUT, device=m),
    ),
    Case("zeros", "dtype not said", lambda m: ttnn.zeros((9, 1, 32, 64), device=m)),
    Case("zeros", "bfloat8_b, layout not said", lambda m: ttnn.zeros((9, 1, 32, 64), dtype=ttnn.bfloat8_b, device=m)),
    Case("zeros", "bfloat8_b in ROW_MAJOR", lambda m: zeros(m, 9, 1, 32, 64, dtype=ttnn.bfloat8_b)),
    Case(
        "full",
        "a constant",
        lambda m: ttnn.full((1, 1, 32, 64), -1.0e4, dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=m),
    ),
    Case("full", "dtype not said", lambda m: ttnn.full((32, 64), 1.0, device=m)),
    Case("full", "bfloat8_b, layout not said", lambda m: ttnn.full((32, 64), 1.0, dtype=ttnn.bfloat8_b, device=m)),
    Case(
        "full",
        "bfloat8_b in ROW_MAJOR",
        lambda m: ttnn.full((32, 64), 1.0, dtype=ttnn.bfloat8_b, layout=ttnn.ROW_MAJOR_LAYOUT, device=m),
    ),
    Case("fill", "a cache", lambda m: filled(tiles(m, 9, 1, 32, 64, dtype=ttnn.bfloat8_b))),
    Case("fill", "another one", lambda m: ttnn.fill(tiles(m, 1, 1, 5, 40), 2.5)),
    Case(
        "fill",
        "in place of another shape",
        lambda m: ttnn.fill(tiles(m, 1, 1, 32, 64), 0.0, output_tensor=tiles(m, 1, 1, 32, 32)),
    ),
    Case(
        "fill",
        "in place of another dtype",
        lambda m: ttnn.fill(tiles(m, 1, 1, 32, 64), 0.0, output_tensor=tiles(m, 1, 1, 32, 64, dtype=ttnn.float32)),
    ),
    Case("as_tensor", "a weight", lambda m: as_tensor(m, ttnn.TILE_LAYOUT)),
    Case("as_tensor", "memory config not said", lambda m: as_tensor(m, ttnn.TILE_LAYOUT, memory_config=None)),
    Case("as_tensor", "bfloat8_b in ROW_MAJOR", lambda m: as_tensor(m, ttnn.ROW_MAJOR_LAYOUT)),
    Case("as_tensor", "an uneven part", lambda m: as_tensor(m, ttnn.TILE_LAYOUT, 500)),
    Case(
        "to_torch",
        "joined",
        lambda m: ttnn.to_torch(tiles(m, 1, 1, 32, 64), mesh_composer=ttnn.ConcatMesh2dToTensor(m, (4, 8), (2, 3))),
        ALL_ROWS,
    ),
    Case(
        "to_torch",
        "all chips joined",
        lambda m: ttnn.to_torch(tiles(m, 1, 1, 32, 64), mesh_composer=ttnn.ConcatMeshToTensor(m, 1)),
    ),
    Case("to_torch", "not joined", lambda m: ttnn.to_torch(tiles(m, 1, 1, 32, 64))),
    Case("to_torch", "one chip's", lambda m: ttnn.to_torch(ttnn.get_device_tensors(tiles(m, 1, 1, 32, 64))[3])),
    Case(
        "to_torch",
        "both axes along one dimension",
        lambda m: ttnn.to_torch(tiles(m, 1, 1, 32, 64), mesh_composer=ttnn.ConcatMesh2dToTensor(m, (4, 8), (3, 3))),
        ALL_ROWS,
    ),
    Case("from_device", "and back", lambda m: ttnn.to_device(ttnn.from_device(tiles(m, 1, 1, 32, 64)), m)),
    Case("load_tensor", "a weight", reloaded),
    Case("load_tensor", "a file that is not there", of_no_file),
    Case("dump_tensor", "a weight", reloaded),
    Case("dump_tensor", "another suffix", lambda m: reloaded(m, "weight.bin")),
    Case("clone", "hidden states", lambda m: ttnn.clone(tiles(m, 1, 1, 32, 64))),
    Case("clone", "pages", lambda m: ttnn.clone(rows(m, 4, 2, dtype=ttnn.int32))),
    Case("copy", "hidden states", lambda m: written(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 64))),
    Case("copy", "pages", lambda m: written(rows(m, 4, 2, dtype=ttnn.int32), rows(m, 4, 2, dtype=ttnn.int32))),
    Case("copy", "another shape", lambda m: written(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 32))),
    Case(
        "copy",
        "another dtype",
        lambda m: written(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 64, dtype=ttnn.float32)),
        differs="a step's inputs are those that its trace was captured with",
    ),
    Case("copy", "another layout", lambda m: written(tiles(m, 1, 1, 32, 64), rows(m, 1, 1, 32, 64))),
]
