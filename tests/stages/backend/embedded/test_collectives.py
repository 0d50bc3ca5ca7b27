"""The values of ops between chips, along both axes of a mesh."""

from collections.abc import Callable

import pytest
import torch

from stages.backend import ttnn
from stages.errors import DeviceError
from tests.support.embedded_meshes import put, shards

pytestmark = pytest.mark.usefixtures("float32")

ROWS, COLUMNS = 2, 4


def every_chip_its_own(*shape: int) -> tuple[ttnn.Tensor, list[list[torch.Tensor]]]:
    """Makes a tensor whose shards all differ; returns it with its shards by row and column."""
    mesh = ttnn.open_mesh_device(ttnn.MeshShape(ROWS, COLUMNS))
    own = [[torch.randn(1, *shape) for _ in range(COLUMNS)] for _ in range(ROWS)]
    whole = torch.cat([torch.cat([part[:, None] for part in row], 1) for row in own])
    tensor = put(mesh, whole, (0, 1))
    return ttnn.reshape(tensor, (1, *shape)), own


def neighbours(own: list[list[torch.Tensor]], axis: int, row: int, column: int) -> list[torch.Tensor]:
    return [own[r][column] for r in range(ROWS)] if axis == 0 else own[row]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (lambda x, axis: ttnn.all_gather(x, 3, cluster_axis=axis), lambda group, at: torch.cat(group, 3)),
        (lambda x, axis: ttnn.all_gather(x, 1, cluster_axis=axis), lambda group, at: torch.cat(group, 1)),
        (lambda x, axis: ttnn.all_reduce(x, cluster_axis=axis), lambda group, at: torch.stack(group).sum(0)),
        (
            lambda x, axis: ttnn.reduce_scatter(x, 3, cluster_axis=axis),
            lambda group, at: torch.stack(group).sum(0).chunk(len(group), 3)[at],
        ),
        (
            lambda x, axis: ttnn.mesh_partition(x, 1, axis),
            lambda group, at: group[at].chunk(len(group), 1)[at],
        ),
        (
            lambda x, axis: ttnn.experimental.all_to_all_async_generic(x, in_dim=2, out_dim=1, cluster_axis=axis),
            lambda group, at: torch.cat([member.chunk(len(group), 1)[at] for member in group], 2),
        ),
    ],
    ids=["all_gather-3", "all_gather-1", "all_reduce", "reduce_scatter", "mesh_partition", "all_to_all"],
)
def test_collectives(
    axis: int,
    op: Callable[[ttnn.Tensor, int], ttnn.Tensor],
    expected: Callable[[list[torch.Tensor], int], torch.Tensor],
) -> None:
    tensor, own = every_chip_its_own(8, 4, 16)
    before = [shard.clone() for shard in shards(tensor)]
    for number, shard in enumerate(shards(op(tensor, axis))):
        row, column = divmod(number, COLUMNS)
        group = neighbours(own, axis, row, column)
        torch.testing.assert_close(shard, expected(group, row if axis == 0 else column), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(shard, old) for shard, old in zip(shards(tensor), before, strict=True))


def test_heads_become_users_and_users_heads_again() -> None:
    tensor, _ = every_chip_its_own(8, 4, 16)
    swapped = ttnn.experimental.all_to_all_async_generic(tensor, in_dim=2, out_dim=1, cluster_axis=1)
    assert swapped.shape == (1, 2, 16, 16)
    back = ttnn.experimental.all_to_all_async_generic(swapped, in_dim=1, out_dim=2, cluster_axis=1)
    assert all(torch.equal(a, b) for a, b in zip(shards(back), shards(tensor), strict=True))


COLLECTIVES: list[Callable[[ttnn.Tensor, int], ttnn.Tensor]] = [
    lambda x, axis: ttnn.all_gather(x, 3, cluster_axis=axis),
    lambda x, axis: ttnn.all_reduce(x, cluster_axis=axis),
    lambda x, axis: ttnn.reduce_scatter(x, 3, cluster_axis=axis),
    lambda x, axis: ttnn.mesh_partition(x, 3, axis),
    lambda x, axis: ttnn.experimental.all_to_all_async_generic(x, in_dim=2, out_dim=3, cluster_axis=axis),
]


@pytest.mark.parametrize("collective", COLLECTIVES)
def test_an_axis_of_one_chip_and_uneven_parts_are_refused(
    collective: Callable[[ttnn.Tensor, int], ttnn.Tensor],
) -> None:
    row = ttnn.open_mesh_device(ttnn.MeshShape(1, 8))
    with pytest.raises(DeviceError, match=r"axis 0 of a mesh of \(1, 8\) has one chip"):
        collective(put(row, torch.zeros(1, 1, 8, 256)), 0)
    gone = put(row, torch.zeros(1, 1, 8, 256))
    ttnn.deallocate(gone)
    with pytest.raises(DeviceError, match="after deallocate"):
        collective(gone, 1)


@pytest.mark.parametrize("collective", COLLECTIVES[2:])
def test_uneven_parts_are_refused(collective: Callable[[ttnn.Tensor, int], ttnn.Tensor]) -> None:
    row = ttnn.open_mesh_device(ttnn.MeshShape(1, 8))
    with pytest.raises(DeviceError, match="dimension 3 cannot be cut evenly for 8 chips"):
        collective(put(row, torch.zeros(1, 1, 8, 12)), 1)
