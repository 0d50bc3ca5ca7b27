"""Cases of matrix products: `linear` and `matmul`."""

from stages.backend import ttnn
from tests.support.op_cases.case import Case, rows, tiles

KERNEL = ttnn.WormholeComputeKernelConfig(
    math_fidelity=ttnn.MathFidelity.HiFi2, math_approx_mode=False, fp32_dest_acc_en=False, packer_l1_acc=True
)

CASES = [
    Case("linear", "tokens by a weight", lambda m: ttnn.linear(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 64, 96))),
    Case(
        "linear",
        "into L1, with a kernel config",
        lambda m: ttnn.linear(
            tiles(m, 1, 1, 32, 64),
            tiles(m, 1, 1, 64, 96, dtype=ttnn.bfloat8_b),
            memory_config=ttnn.L1_MEMORY_CONFIG,
            compute_kernel_config=KERNEL,
        ),
    ),
    Case(
        "linear",
        "bfloat4_b weight",
        lambda m: ttnn.linear(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 64, 96, dtype=ttnn.bfloat4_b)),
    ),
    Case(
        "linear",
        "bfloat8_b tokens",
        lambda m: ttnn.linear(
            tiles(m, 1, 1, 32, 64, dtype=ttnn.bfloat8_b), tiles(m, 1, 1, 64, 96, dtype=ttnn.bfloat8_b)
        ),
    ),
    Case(
        "linear",
        "float32 weight, float32 out",
        lambda m: ttnn.linear(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 64, 96, dtype=ttnn.float32), dtype=ttnn.float32),
    ),
    Case(
        "linear",
        "float32 weight, dtype not said",
        lambda m: ttnn.linear(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 64, 96, dtype=ttnn.float32)),
    ),
    Case("linear", "five tokens", lambda m: ttnn.linear(tiles(m, 1, 1, 5, 64), tiles(m, 1, 1, 64, 96))),
    Case("linear", "a weight of no whole tiles", lambda m: ttnn.linear(tiles(m, 1, 1, 5, 40), tiles(m, 1, 1, 40, 24))),
    Case("linear", "a weight a head", lambda m: ttnn.linear(tiles(m, 1, 4, 32, 64), tiles(m, 1, 4, 64, 96))),
    Case("linear", "heads by one weight", lambda m: ttnn.linear(tiles(m, 1, 4, 32, 64), tiles(m, 1, 1, 64, 96))),
    Case("linear", "weight [K, N]", lambda m: ttnn.linear(tiles(m, 1, 1, 32, 64), tiles(m, 64, 96))),
    Case("linear", "tokens [T, K]", lambda m: ttnn.linear(tiles(m, 32, 64), tiles(m, 64, 96))),
    Case(
        "linear",
        "silu after it",
        lambda m: ttnn.linear(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 64, 96), activation="silu"),
    ),
    Case(
        "linear",
        "unknown activation",
        lambda m: ttnn.linear(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 64, 96), activation="swigloo"),
    ),
    Case("linear", "wrong K", lambda m: ttnn.linear(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 96, 64))),
    Case("linear", "wrong K in as many tiles", lambda m: ttnn.linear(tiles(m, 1, 1, 32, 60), tiles(m, 1, 1, 64, 96))),
    Case("linear", "weight not transposed", lambda m: ttnn.linear(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 96, 64))),
    Case("linear", "another number of heads", lambda m: ttnn.linear(tiles(m, 1, 4, 32, 64), tiles(m, 1, 3, 64, 96))),
    Case("linear", "tokens in ROW_MAJOR", lambda m: ttnn.linear(rows(m, 1, 1, 32, 64), tiles(m, 1, 1, 64, 96))),
    Case("linear", "weight in ROW_MAJOR", lambda m: ttnn.linear(tiles(m, 1, 1, 32, 64), rows(m, 1, 1, 64, 96))),
    Case(
        "linear",
        "uint32 tokens",
        lambda m: ttnn.linear(tiles(m, 1, 1, 32, 64, dtype=ttnn.uint32), tiles(m, 1, 1, 64, 96)),
    ),
    Case(
        "linear",
        "uint16 weight",
        lambda m: ttnn.linear(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 64, 96, dtype=ttnn.uint16)),
    ),
    Case(
        "linear",
        "weight on the host",
        lambda m: ttnn.linear(tiles(m, 1, 1, 32, 64), ttnn.from_device(tiles(m, 1, 1, 64, 96))),
    ),
    Case("matmul", "tokens by every expert", lambda m: ttnn.matmul(tiles(m, 1, 1, 32, 64), tiles(m, 1, 4, 64, 96))),
    Case("matmul", "five tokens by every expert", lambda m: ttnn.matmul(tiles(m, 1, 1, 5, 40), tiles(m, 1, 4, 40, 24))),
    Case("matmul", "every expert's own", lambda m: ttnn.matmul(tiles(m, 1, 4, 32, 64), tiles(m, 1, 4, 64, 96))),
    Case(
        "matmul",
        "bfloat4_b experts into L1",
        lambda m: ttnn.matmul(
            tiles(m, 1, 1, 32, 64),
            tiles(m, 1, 4, 64, 96, dtype=ttnn.bfloat4_b),
            memory_config=ttnn.L1_MEMORY_CONFIG,
            compute_kernel_config=KERNEL,
        ),
    ),
    Case("matmul", "weights by the selection", lambda m: ttnn.matmul(tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 64, 8))),
    Case("matmul", "wrong K", lambda m: ttnn.matmul(tiles(m, 1, 1, 32, 64), tiles(m, 1, 4, 96, 64))),
    Case("matmul", "another number of experts", lambda m: ttnn.matmul(tiles(m, 1, 4, 32, 64), tiles(m, 1, 3, 64, 96))),
    Case("matmul", "experts in ROW_MAJOR", lambda m: ttnn.matmul(tiles(m, 1, 1, 32, 64), rows(m, 1, 4, 64, 96))),
    Case(
        "matmul",
        "uint16 factor",
        lambda m: ttnn.matmul(tiles(m, 1, 1, 32, 64, dtype=ttnn.uint16), tiles(m, 1, 1, 64, 96)),
    ),
    Case("matmul", "one dimension", lambda m: ttnn.matmul(tiles(m, 1, 1, 32, 64), tiles(m, 64))),
]
