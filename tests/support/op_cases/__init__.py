"""Cases of every op: valid and invalid calls, for the embedded device and for ttnn on a mock Galaxy."""

from tests.support.op_cases import (
    attention,
    caches,
    choices,
    collectives,
    eltwise,
    fused,
    movement,
    norms,
    products,
    tensors,
    two_meshes,
)

_CASES = [
    *tensors.CASES,
    *products.CASES,
    *norms.CASES,
    *eltwise.CASES,
    *movement.CASES,
    *choices.CASES,
    *collectives.CASES,
    *caches.CASES,
    *attention.CASES,
    *fused.CASES,
    *two_meshes.CASES,
]
_OPS = list(dict.fromkeys(case.op for case in _CASES))

CASES = sorted(_CASES, key=lambda case: _OPS.index(case.op))
"""All cases, in the order of the table in docs/ops.md."""
