"""The numbers of programs of prefill steps in predictions of time are those that a mock Galaxy executes for R1."""

import pytest

from stages.models.deepseek_v3.architecture import OPS
from tests.galaxy.empty_block import EmptyBlock
from tests.galaxy.meshes import opened
from tests.galaxy.programs import executed
from tests.galaxy.r1 import COLUMNS, R1
from tests.support.plans import deployment


@pytest.mark.parametrize(("rows", "layer"), [(1, 0), (1, 3), (4, 3)])
def test_of_a_prompt_of_one_request(rows: int, layer: int) -> None:
    with opened(rows, COLUMNS) as mesh:
        count = executed(mesh, EmptyBlock(R1, deployment(1, rows, microbatches=1), layer, mesh).prefill(1024))
    assert count == OPS.layer(is_moe=layer > 0, rows=rows, tokens=1024, is_decode=False)
