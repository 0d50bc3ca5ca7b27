"""Cases of RMS norm, whole or in two halves."""

from stages.backend import ttnn
from tests.support.op_cases.case import Case, rows, tiles


def post(x: ttnn.Tensor, stats: ttnn.Tensor, weight: ttnn.Tensor) -> ttnn.Tensor:
    """Calls the second half as the modules do."""
    return ttnn.rms_norm_post_all_gather(x, stats, weight=weight, epsilon=1e-6, memory_config=ttnn.L1_MEMORY_CONFIG)


CASES = [
    Case(
        "rms_norm",
        "gamma [1, 1, 1, W]",
        lambda m: ttnn.rms_norm(tiles(m, 1, 1, 32, 96), weight=tiles(m, 1, 1, 1, 96), epsilon=1e-6),
    ),
    Case(
        "rms_norm",
        "gamma [1, 1, W / 32, 32] in ROW_MAJOR",
        lambda m: ttnn.rms_norm(tiles(m, 1, 1, 32, 96), weight=rows(m, 1, 1, 3, 32), epsilon=1e-6),
    ),
    Case(
        "rms_norm",
        "into L1",
        lambda m: ttnn.rms_norm(
            tiles(m, 1, 1, 32, 96),
            weight=tiles(m, 1, 1, 1, 96),
            epsilon=1e-6,
            memory_config=ttnn.L1_MEMORY_CONFIG,
        ),
    ),
    Case(
        "rms_norm",
        "five tokens of several heads",
        lambda m: ttnn.rms_norm(tiles(m, 1, 4, 5, 96), weight=tiles(m, 1, 1, 1, 96)),
    ),
    Case(
        "rms_norm",
        "bfloat8_b tokens",
        lambda m: ttnn.rms_norm(tiles(m, 1, 1, 32, 96, dtype=ttnn.bfloat8_b), weight=tiles(m, 1, 1, 1, 96)),
    ),
    Case(
        "rms_norm",
        "float32 gamma",
        lambda m: ttnn.rms_norm(tiles(m, 1, 1, 32, 96), weight=tiles(m, 1, 1, 1, 96, dtype=ttnn.float32)),
    ),
    Case(
        "rms_norm",
        "gamma beyond the width",
        lambda m: ttnn.rms_norm(tiles(m, 1, 1, 32, 80), weight=tiles(m, 1, 1, 1, 96)),
        differs="ttnn takes as much of gamma as there are values",
    ),
    Case("rms_norm", "gamma [1, W]", lambda m: ttnn.rms_norm(tiles(m, 1, 1, 32, 96), weight=tiles(m, 1, 96))),
    Case(
        "rms_norm",
        "gamma [2, W]",
        lambda m: ttnn.rms_norm(tiles(m, 1, 1, 32, 96), weight=tiles(m, 2, 96)),
        differs="ttnn takes one row of them",
    ),
    Case("rms_norm", "gamma [W]", lambda m: ttnn.rms_norm(tiles(m, 1, 1, 32, 96), weight=tiles(m, 96))),
    Case(
        "rms_norm",
        "gamma of another width",
        lambda m: ttnn.rms_norm(tiles(m, 1, 1, 32, 96), weight=tiles(m, 1, 1, 1, 64)),
    ),
    Case(
        "rms_norm",
        "gamma of another width in as many tiles",
        lambda m: ttnn.rms_norm(tiles(m, 1, 1, 32, 96), weight=tiles(m, 1, 1, 1, 80)),
    ),
    Case(
        "rms_norm",
        "gamma [1, 1, W / 32, 32] in TILE",
        lambda m: ttnn.rms_norm(tiles(m, 1, 1, 32, 96), weight=tiles(m, 1, 1, 3, 32)),
    ),
    Case(
        "rms_norm",
        "gamma [1, 1, 1, W] in ROW_MAJOR",
        lambda m: ttnn.rms_norm(tiles(m, 1, 1, 32, 96), weight=rows(m, 1, 1, 1, 96)),
    ),
    Case(
        "rms_norm",
        "bfloat8_b gamma",
        lambda m: ttnn.rms_norm(tiles(m, 1, 1, 32, 96), weight=tiles(m, 1, 1, 1, 96, dtype=ttnn.bfloat8_b)),
    ),
    Case(
        "rms_norm",
        "tokens in ROW_MAJOR",
        lambda m: ttnn.rms_norm(rows(m, 1, 1, 32, 96), weight=tiles(m, 1, 1, 1, 96)),
    ),
    Case(
        "rms_norm",
        "uint32 tokens",
        lambda m: ttnn.rms_norm(tiles(m, 1, 1, 32, 96, dtype=ttnn.uint32), weight=tiles(m, 1, 1, 1, 96)),
    ),
    Case("rms_norm_pre_all_gather", "a chip's part", lambda m: ttnn.rms_norm_pre_all_gather(tiles(m, 1, 1, 32, 96))),
    Case("rms_norm_pre_all_gather", "five tokens", lambda m: ttnn.rms_norm_pre_all_gather(tiles(m, 1, 1, 5, 96))),
    Case(
        "rms_norm_pre_all_gather",
        "float32 statistics",
        lambda m: ttnn.rms_norm_pre_all_gather(tiles(m, 1, 1, 32, 96), dtype=ttnn.float32),
    ),
    Case(
        "rms_norm_pre_all_gather",
        "float32 tokens",
        lambda m: ttnn.rms_norm_pre_all_gather(tiles(m, 1, 1, 32, 96, dtype=ttnn.float32)),
    ),
    Case(
        "rms_norm_pre_all_gather",
        "tokens in ROW_MAJOR",
        lambda m: ttnn.rms_norm_pre_all_gather(rows(m, 1, 1, 32, 96)),
    ),
    Case(
        "rms_norm_pre_all_gather",
        "uint32 tokens",
        lambda m: ttnn.rms_norm_pre_all_gather(tiles(m, 1, 1, 32, 96, dtype=ttnn.uint32)),
    ),
    Case(
        "rms_norm_post_all_gather",
        "statistics of the eight columns",
        lambda m: post(tiles(m, 1, 1, 32, 96), tiles(m, 1, 1, 32, 256), tiles(m, 1, 1, 1, 96)),
    ),
    Case(
        "rms_norm_post_all_gather",
        "five tokens",
        lambda m: post(tiles(m, 1, 1, 5, 96), tiles(m, 1, 1, 5, 256), tiles(m, 1, 1, 1, 96)),
    ),
    Case(
        "rms_norm_post_all_gather",
        "gamma [1, 1, W / 32, 32] in ROW_MAJOR",
        lambda m: post(tiles(m, 1, 1, 32, 96), tiles(m, 1, 1, 32, 256), rows(m, 1, 1, 3, 32)),
    ),
    Case(
        "rms_norm_post_all_gather",
        "statistics of one chip",
        lambda m: post(tiles(m, 1, 1, 32, 96), tiles(m, 1, 1, 32, 32), tiles(m, 1, 1, 1, 96)),
        differs="a gather was forgotten: each chip would norm by its own part alone",
    ),
    Case(
        "rms_norm_post_all_gather",
        "statistics of no whole tiles",
        lambda m: post(tiles(m, 1, 1, 32, 96), tiles(m, 1, 1, 32, 40), tiles(m, 1, 1, 1, 96)),
        differs="they are those of no number of chips",
    ),
    Case(
        "rms_norm_post_all_gather",
        "statistics of other tokens",
        lambda m: post(tiles(m, 1, 1, 32, 96), tiles(m, 1, 1, 64, 256), tiles(m, 1, 1, 1, 96)),
    ),
    Case(
        "rms_norm_post_all_gather",
        "gamma [W]",
        lambda m: post(tiles(m, 1, 1, 32, 96), tiles(m, 1, 1, 32, 256), tiles(m, 96)),
    ),
    Case(
        "rms_norm_post_all_gather",
        "gamma of another width",
        lambda m: post(tiles(m, 1, 1, 32, 96), tiles(m, 1, 1, 32, 256), tiles(m, 1, 1, 1, 64)),
    ),
    Case(
        "rms_norm_post_all_gather",
        "tokens in ROW_MAJOR",
        lambda m: post(rows(m, 1, 1, 32, 96), tiles(m, 1, 1, 32, 256), tiles(m, 1, 1, 1, 96)),
    ),
    Case(
        "rms_norm_post_all_gather",
        "statistics in ROW_MAJOR",
        lambda m: post(tiles(m, 1, 1, 32, 96), rows(m, 1, 1, 32, 256), tiles(m, 1, 1, 1, 96)),
    ),
]
