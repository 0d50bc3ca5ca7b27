"""ttnn accepts and refuses on a mock Galaxy what docs/ops.md says, as the embedded device does."""

import pytest

from tests.support.op_cases import CASES
from tests.support.op_table import MESHES, key_of, observed, read


@pytest.mark.parametrize("mesh_shape", MESHES)
def test_ttnn_does_what_the_table_says(mesh_shape: tuple[int, int]) -> None:
    rows = read()
    expected = {key_of(case): rows[key_of(case)].ttnn for case in CASES if case.mesh == mesh_shape}
    assert observed(mesh_shape) == expected
