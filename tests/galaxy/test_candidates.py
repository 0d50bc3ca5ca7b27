"""Candidates of R1's logits on mock chips: ttnn takes every op, at the sizes of a row and of a whole Galaxy."""

import numpy as np
import pytest

from stages.backend import ttnn
from stages.candidates import CANDIDATES, CandidateFinder, CandidateRows
from tests.galaxy.meshes import opened
from tests.galaxy.r1 import COLUMNS, R1, USERS_PER_ROW
from tests.support.op_cases.case import tiles

SHARE = R1.vocab_size // COLUMNS


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("vocabulary", [R1.vocab_size, R1.vocab_size - 7], ids=["even", "padded"])
def test_candidates_and_rows_are_found(rows: int, vocabulary: int) -> None:
    with opened(rows, COLUMNS) as mesh:
        finder = CandidateFinder(mesh, vocabulary)
        logits = tiles(mesh, 1, 1, USERS_PER_ROW, SHARE)
        found = finder.find(logits)
        assert [tuple(tensor.shape) for tensor in found] == [(1, 1, USERS_PER_ROW, CANDIDATES)] * 3
        assert [tensor.dtype for tensor in found] == [ttnn.bfloat16, ttnn.uint16, ttnn.float32]
        last = rows * USERS_PER_ROW - 1
        host = finder.read(logits, found, {0: np.array([3, vocabulary - 1]), last: np.arange(64)})
        assert finder.rank(host, range(last + 1)).ranked.tokens.shape == (last + 1, COLUMNS * CANDIDATES)
        assert [logits.shape for _, logits in finder.named(host).values()] == [(2,), (64,)]
        whole = CandidateRows(finder, host, logits, range(last + 1)).fetch([0, last])
        assert [row.shape for row in whole] == [(vocabulary,)] * 2
