"""Cases with operands on two rows of a Galaxy that are separate meshes."""

from stages.backend import ttnn
from tests.support.op_cases.attention import DECODE, PREFILL, decode, prefill
from tests.support.op_cases.caches import FILL, ROTARY, UPDATE, WIDTH, cache_of, fill, rotate, update, users
from tests.support.op_cases.case import ALL_ROWS, Case, rows, tiles, zeros
from tests.support.op_cases.choices import gate, ids, picks
from tests.support.op_cases.norms import post

NAME = "operands of two meshes"
UNSEEN = "ttnn does not look, and reads on one mesh what lies at the other's addresses"


def two(mesh: ttnn.MeshDevice) -> tuple[ttnn.MeshDevice, ttnn.MeshDevice]:
    """The meshes of the first two rows."""
    first, second, *_ = mesh.create_submeshes(ttnn.MeshShape(1, 8))
    return first, second


def _add(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    here, there = two(mesh)
    return ttnn.add(tiles(here, 1, 1, 32, 64), tiles(there, 1, 1, 32, 64))


def _linear(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    here, there = two(mesh)
    return ttnn.linear(tiles(here, 1, 1, 32, 64), tiles(there, 1, 1, 64, 96))


def _matmul(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    here, there = two(mesh)
    return ttnn.matmul(tiles(here, 1, 1, 32, 64), tiles(there, 1, 4, 64, 96))


def _concat(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    here, there = two(mesh)
    return ttnn.concat([tiles(here, 1, 1, 32, 64), tiles(there, 1, 1, 32, 64)], dim=3)


def _rms_norm(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    here, there = two(mesh)
    return ttnn.rms_norm(tiles(here, 1, 1, 32, 96), weight=tiles(there, 1, 1, 1, 96))


def _post(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    here, there = two(mesh)
    return post(tiles(here, 1, 1, 32, 96), tiles(there, 1, 1, 32, 256), tiles(here, 1, 1, 1, 96))


def _embedding(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    here, there = two(mesh)
    return ttnn.embedding(ids(here, 1, 32), rows(there, 128, 64))


def _gather(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    here, there = two(mesh)
    return ttnn.gather(tiles(here, 1, 1, 32, 64), -1, index=picks(there, 1, 1, 32, 8))


def _gate(mesh: ttnn.MeshDevice) -> tuple[ttnn.Tensor, ttnn.Tensor]:
    here, there = two(mesh)
    return gate(tiles(here, 1, 1, 32, 256), tiles(there, 1, 1, 32, 256))


def _copy(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    here, there = two(mesh)
    return ttnn.copy(tiles(here, 1, 1, 32, 64), tiles(there, 1, 1, 32, 64))


def _rotate(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    here, there = two(mesh)
    angles = tiles(there, 1, 1, 32, 64)
    return rotate(tiles(here, 1, 4, 32, 64), angles, angles, tiles(here, 1, 1, 32, 32))


def _update(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    here, there = two(mesh)
    return update(cache_of(here), users(there), zeros(there, 4), zeros(there, 4, 2))


def _fill(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    here, there = two(mesh)
    return fill(cache_of(here), tiles(there, 1, 1, 64, WIDTH, dtype=ttnn.bfloat8_b), zeros(here, 1, 2))


def _decode(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    here, there = two(mesh)
    return decode(tiles(here, 1, 4, 32, WIDTH), cache_of(there), zeros(here, 4), zeros(here, 4, 4))


def _prefill(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    here, there = two(mesh)
    return prefill(tiles(here, 1, 16, 64, WIDTH), cache_of(there), zeros(here, 1, 2))


CASES = [
    Case("copy", NAME, _copy, ALL_ROWS),
    Case("linear", NAME, _linear, ALL_ROWS),
    Case("matmul", NAME, _matmul, ALL_ROWS),
    Case("rms_norm", NAME, _rms_norm, ALL_ROWS),
    Case("rms_norm_post_all_gather", NAME, _post, ALL_ROWS, UNSEEN),
    Case("add", NAME, _add, ALL_ROWS),
    Case("concat", NAME, _concat, ALL_ROWS),
    Case("embedding", NAME, _embedding, ALL_ROWS, UNSEEN),
    Case("gather", NAME, _gather, ALL_ROWS),
    Case("experimental.deepseek_grouped_gate", NAME, _gate, ALL_ROWS, UNSEEN),
    Case(ROTARY, NAME, _rotate, ALL_ROWS),
    Case(UPDATE, NAME, _update, ALL_ROWS),
    Case(FILL, NAME, _fill, ALL_ROWS, UNSEEN),
    Case(DECODE, NAME, _decode, ALL_ROWS, UNSEEN),
    Case(PREFILL, NAME, _prefill, ALL_ROWS, UNSEEN),
]
