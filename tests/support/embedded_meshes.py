"""Meshes of the embedded device for tests, with functions that put tensors on them and read shards."""

from collections.abc import Sequence

import pytest
import torch

from stages.backend import ttnn

SHAPES = [(1, 1), (1, 8), (2, 4)]


def _open(shape: tuple[int, int]) -> ttnn.MeshDevice:
    return ttnn.open_mesh_device(ttnn.MeshShape(*shape))


def on_mesh_shapes(shapes: Sequence[tuple[int, int]]) -> pytest.MarkDecorator:
    """Runs a test on a mesh of each of these shapes."""
    return pytest.mark.parametrize(
        "mesh", [_open(shape) for shape in shapes], ids=[f"{rows}x{columns}" for rows, columns in shapes]
    )


on_meshes = on_mesh_shapes(SHAPES)
"""Runs a test on a mesh of each shape."""

on_chip = pytest.mark.parametrize("mesh", [_open((1, 1))], ids=["1x1"])
"""Runs a test on one chip."""


def put(
    mesh: ttnn.MeshDevice,
    tensor: torch.Tensor,
    dims: tuple[int | None, int | None] = (None, None),
    dtype: ttnn.DataType = ttnn.bfloat16,
    layout: ttnn.Layout = ttnn.TILE_LAYOUT,
) -> ttnn.Tensor:
    """Puts `tensor` on the mesh, split along `dims` by the mesh's axes."""
    mapper = ttnn.ShardTensor2dMesh(mesh, tuple(mesh.shape), dims)
    return ttnn.from_torch(tensor, dtype, layout=layout, device=mesh, mesh_mapper=mapper)


def integers(mesh: ttnn.MeshDevice, tensor: torch.Tensor, dtype: ttnn.DataType = ttnn.int32) -> ttnn.Tensor:
    """Puts the same integers on every chip, in ROW_MAJOR layout."""
    return put(mesh, tensor, dtype=dtype, layout=ttnn.ROW_MAJOR_LAYOUT)


def shards(tensor: ttnn.Tensor) -> list[torch.Tensor]:
    """The shard of each chip as a torch tensor."""
    return [ttnn.to_torch(one) for one in ttnn.get_device_tensors(tensor)]


def assert_everywhere(tensor: ttnn.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Checks that every chip has the values `expected`."""
    for shard in shards(tensor):
        torch.testing.assert_close(shard, expected, rtol=tolerance, atol=tolerance, check_dtype=False)
