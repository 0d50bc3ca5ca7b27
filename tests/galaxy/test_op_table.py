"""On a mock Galaxy ttnn accepts and refuses what the table in docs/ops.md has for it."""

import pytest

from tests.support.op_cases import CASES
from tests.support.op_table import MESHES, key_of, observed, read


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_ttnn_does_what_the_table_says(mesh_shape: tuple[int, int]) -> None:
    rows = read()
    expected = {key_of(case): rows[key_of(case)].ttnn for case in CASES if case.mesh == mesh_shape}
    assert observed(mesh_shape) == expected
