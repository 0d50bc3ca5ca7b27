"""Cases of elementwise ops."""

from stages.backend import ttnn
from tests.support.op_cases.case import Case, rows, tiles

SILU = [ttnn.UnaryOpType.SILU]

CASES = [
    Case("add", "the residual", lambda m: ttnn.add(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 64))),
    Case("add", "a number", lambda m: ttnn.add(tiles(m, 1, 1, 32, 64), 1e-20)),
    Case("add", "a row to all tokens", lambda m: ttnn.add(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 1, 64))),
    Case("add", "a row in front", lambda m: ttnn.add(tiles(m, 1, 1, 1, 64), tiles(m, 1, 1, 32, 64))),
    Case("add", "fewer dimensions", lambda m: ttnn.add(tiles(m, 1, 1, 32, 64), tiles(m, 64))),
    Case("add", "both in ROW_MAJOR", lambda m: ttnn.add(rows(m, 1, 1, 32, 64), rows(m, 1, 1, 32, 64))),
    Case("add", "five tokens", lambda m: ttnn.add(tiles(m, 1, 1, 5, 40), tiles(m, 1, 1, 5, 40))),
    Case("mul", "five tokens' experts", lambda m: ttnn.mul(tiles(m, 1, 4, 5, 64), tiles(m, 1, 4, 5, 1))),
    Case("div", "five tokens", lambda m: ttnn.div(tiles(m, 1, 1, 5, 8), tiles(m, 1, 1, 5, 1))),
    Case("subtract", "five tokens", lambda m: ttnn.subtract(tiles(m, 1, 1, 5, 40), tiles(m, 1, 1, 5, 40))),
    Case("silu", "five tokens", lambda m: ttnn.silu(tiles(m, 1, 1, 5, 40))),
    Case("sigmoid", "five tokens", lambda m: ttnn.sigmoid(tiles(m, 1, 1, 5, 40))),
    Case("typecast", "five tokens", lambda m: ttnn.typecast(tiles(m, 1, 1, 5, 40), ttnn.bfloat8_b)),
    Case(
        "add",
        "float32 to bfloat16",
        lambda m: ttnn.add(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 64, dtype=ttnn.float32)),
    ),
    Case(
        "add",
        "bfloat8_b to bfloat16",
        lambda m: ttnn.add(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 64, dtype=ttnn.bfloat8_b)),
    ),
    Case(
        "add",
        "bfloat16 to float32",
        lambda m: ttnn.add(tiles(m, 1, 1, 32, 64, dtype=ttnn.float32), tiles(m, 1, 1, 32, 64)),
    ),
    Case(
        "add",
        "bfloat16 to bfloat8_b",
        lambda m: ttnn.add(tiles(m, 1, 1, 32, 64, dtype=ttnn.bfloat8_b), tiles(m, 1, 1, 32, 64)),
    ),
    Case(
        "add",
        "dtype said",
        lambda m: ttnn.add(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 64), dtype=ttnn.float32),
    ),
    Case("add", "another width", lambda m: ttnn.add(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 96))),
    Case("add", "another width in as many tiles", lambda m: ttnn.add(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 63))),
    Case("add", "other tokens", lambda m: ttnn.add(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 64, 64))),
    Case("add", "ROW_MAJOR to TILE", lambda m: ttnn.add(tiles(m, 1, 1, 32, 64), rows(m, 1, 1, 32, 64))),
    Case(
        "add",
        "uint32 to bfloat16",
        lambda m: ttnn.add(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 64, dtype=ttnn.uint32)),
    ),
    Case(
        "add",
        "a tensor on the host",
        lambda m: ttnn.add(tiles(m, 1, 1, 32, 64), ttnn.from_device(tiles(m, 1, 1, 32, 64))),
    ),
    Case("subtract", "of one shape", lambda m: ttnn.subtract(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 64))),
    Case("subtract", "another width", lambda m: ttnn.subtract(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 96))),
    Case("div", "by a column", lambda m: ttnn.div(tiles(m, 1, 1, 32, 8), tiles(m, 1, 1, 32, 1))),
    Case("div", "by a number", lambda m: ttnn.div(tiles(m, 1, 1, 32, 8), 2.5)),
    Case("div", "another width", lambda m: ttnn.div(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 96))),
    Case(
        "mul",
        "silu of the first",
        lambda m: ttnn.mul(
            tiles(m, 1, 1, 32, 64),
            tiles(m, 1, 1, 32, 64),
            input_tensor_a_activations=SILU,
            memory_config=ttnn.L1_MEMORY_CONFIG,
        ),
    ),
    Case("mul", "by a number", lambda m: ttnn.mul(tiles(m, 1, 1, 32, 8), 2.5)),
    Case("mul", "experts by their weights", lambda m: ttnn.mul(tiles(m, 1, 4, 32, 64), tiles(m, 1, 4, 32, 1))),
    Case("mul", "one column by all", lambda m: ttnn.mul(tiles(m, 1, 1, 32, 64), tiles(m, 1, 4, 32, 1))),
    Case("mul", "another number of experts", lambda m: ttnn.mul(tiles(m, 1, 4, 32, 64), tiles(m, 1, 3, 32, 1))),
    Case("mul", "another width", lambda m: ttnn.mul(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 96))),
    Case("mul", "weights not permuted", lambda m: ttnn.mul(tiles(m, 1, 4, 32, 64), tiles(m, 1, 1, 32, 4))),
    Case("silu", "of tokens", lambda m: ttnn.silu(tiles(m, 1, 1, 32, 64))),
    Case("silu", "in ROW_MAJOR", lambda m: ttnn.silu(rows(m, 1, 1, 32, 64))),
    Case("silu", "uint32", lambda m: ttnn.silu(tiles(m, 1, 1, 32, 64, dtype=ttnn.uint32))),
    Case("sigmoid", "of logits", lambda m: ttnn.sigmoid(tiles(m, 1, 1, 32, 64))),
    Case("sigmoid", "float32", lambda m: ttnn.sigmoid(tiles(m, 1, 1, 32, 64, dtype=ttnn.float32))),
    Case("sigmoid", "uint16", lambda m: ttnn.sigmoid(tiles(m, 1, 1, 32, 64, dtype=ttnn.uint16))),
    Case(
        "typecast",
        "float32 to bfloat16",
        lambda m: ttnn.typecast(tiles(m, 1, 1, 32, 64, dtype=ttnn.float32), ttnn.bfloat16),
    ),
    Case("typecast", "bfloat16 to bfloat8_b", lambda m: ttnn.typecast(tiles(m, 1, 1, 32, 64), ttnn.bfloat8_b)),
    Case("typecast", "bfloat16 to bfloat16", lambda m: ttnn.typecast(tiles(m, 1, 1, 32, 64), ttnn.bfloat16)),
    Case("typecast", "bfloat16 to uint32", lambda m: ttnn.typecast(tiles(m, 1, 1, 32, 64), ttnn.uint32)),
    Case(
        "typecast", "uint16 to uint32", lambda m: ttnn.typecast(tiles(m, 1, 1, 32, 64, dtype=ttnn.uint16), ttnn.uint32)
    ),
    Case("typecast", "ROW_MAJOR to float32", lambda m: ttnn.typecast(rows(m, 1, 1, 32, 64), ttnn.float32)),
    Case("typecast", "ROW_MAJOR to bfloat8_b", lambda m: ttnn.typecast(rows(m, 1, 1, 32, 64), ttnn.bfloat8_b)),
    Case(
        "typecast",
        "after deallocate",
        lambda m: ttnn.typecast(deallocated(m), ttnn.float32),
    ),
]


def deallocated(mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    """A deallocated tensor."""
    tensor = tiles(mesh, 1, 1, 32, 64)
    ttnn.deallocate(tensor)
    return tensor
