"""Mock Galaxies open in every shape that a stage uses, and ops are validated on them."""

import pytest
import ttnn

from tests.galaxy.meshes import opened

SHAPES = [(1, 8), (2, 8), (4, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mesh_opens_and_its_collectives_run(shape: tuple[int, int]) -> None:
    rows, columns = shape
    with opened(rows, columns) as mesh:
        x = ttnn.empty((1, 1, 32, 896), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=mesh)
        weight = ttnn.empty((1, 1, 896, 1536), dtype=ttnn.bfloat8_b, layout=ttnn.TILE_LAYOUT, device=mesh)

        y = ttnn.linear(x, weight)

        assert tuple(ttnn.all_gather(y, dim=3, cluster_axis=1).shape) == (1, 1, 32, 1536 * columns)
        assert mesh.get_num_devices() == rows * columns


def test_a_weight_of_another_width_is_refused() -> None:
    with opened(1, 8) as mesh:
        x = ttnn.empty((1, 1, 32, 896), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=mesh)
        weight = ttnn.empty((1, 1, 864, 64), dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=mesh)

        with pytest.raises(RuntimeError, match="864"):
            ttnn.linear(x, weight)
