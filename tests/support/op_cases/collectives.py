"""Cases of ops between chips."""

from stages.backend import ttnn
from tests.support.op_cases.case import ALL_ROWS, Case, rows, tiles

TWO_ROWS = (2, 8)


def all_to_all(x: ttnn.Tensor, in_dim: int, out_dim: int, cluster_axis: int = 1) -> ttnn.Tensor:
    """Swaps heads for users, as attention does."""
    return ttnn.experimental.all_to_all_async_generic(x, in_dim=in_dim, out_dim=out_dim, cluster_axis=cluster_axis)


CASES = [
    Case("all_gather", "hidden states of a row", lambda m: ttnn.all_gather(tiles(m, 1, 1, 32, 64), 3, cluster_axis=1)),
    Case(
        "all_gather",
        "into L1",
        lambda m: ttnn.all_gather(tiles(m, 1, 1, 32, 64), 3, cluster_axis=1, memory_config=ttnn.L1_MEMORY_CONFIG),
    ),
    Case("all_gather", "five tokens", lambda m: ttnn.all_gather(tiles(m, 1, 1, 5, 64), 3, cluster_axis=1)),
    Case("all_gather", "counted from the end", lambda m: ttnn.all_gather(tiles(m, 1, 1, 32, 64), -1, cluster_axis=1)),
    Case("all_gather", "no whole tiles", lambda m: ttnn.all_gather(tiles(m, 1, 1, 32, 8), 3, cluster_axis=1)),
    Case("all_gather", "ROW_MAJOR", lambda m: ttnn.all_gather(rows(m, 1, 1, 32, 64), 3, cluster_axis=1)),
    Case(
        "all_gather",
        "uint32 in ROW_MAJOR",
        lambda m: ttnn.all_gather(rows(m, 1, 1, 32, 64, dtype=ttnn.uint32), 3, cluster_axis=1),
    ),
    Case(
        "all_gather",
        "bfloat8_b",
        lambda m: ttnn.all_gather(tiles(m, 1, 1, 32, 64, dtype=ttnn.bfloat8_b), 3, cluster_axis=1),
    ),
    Case(
        "all_gather",
        "tokens of two rows",
        lambda m: ttnn.all_gather(tiles(m, 1, 1, 32, 64), 2, cluster_axis=0),
        TWO_ROWS,
    ),
    Case(
        "all_gather",
        "tokens of all rows",
        lambda m: ttnn.all_gather(tiles(m, 1, 1, 32, 64), 2, cluster_axis=0),
        ALL_ROWS,
    ),
    Case("all_gather", "an axis of one chip", lambda m: ttnn.all_gather(tiles(m, 1, 1, 32, 64), 3, cluster_axis=0)),
    Case("all_gather", "a third axis", lambda m: ttnn.all_gather(tiles(m, 1, 1, 32, 64), 3, cluster_axis=2)),
    Case("all_gather", "dimension out of range", lambda m: ttnn.all_gather(tiles(m, 1, 1, 32, 64), 4, cluster_axis=1)),
    Case(
        "reduce_scatter",
        "hidden states of a row",
        lambda m: ttnn.reduce_scatter(tiles(m, 1, 1, 32, 512), 3, cluster_axis=1),
    ),
    Case("reduce_scatter", "five tokens", lambda m: ttnn.reduce_scatter(tiles(m, 1, 1, 5, 512), 3, cluster_axis=1)),
    Case(
        "reduce_scatter",
        "tokens of all rows",
        lambda m: ttnn.reduce_scatter(tiles(m, 1, 1, 128, 64), 2, cluster_axis=0),
        ALL_ROWS,
    ),
    Case(
        "reduce_scatter",
        "parts of no whole tiles",
        lambda m: ttnn.reduce_scatter(tiles(m, 1, 1, 32, 128), 3, cluster_axis=1),
    ),
    Case(
        "reduce_scatter",
        "parts of tokens of no whole tiles",
        lambda m: ttnn.reduce_scatter(tiles(m, 1, 1, 32, 64), 2, cluster_axis=0),
        ALL_ROWS,
    ),
    Case(
        "reduce_scatter",
        "an uneven part",
        lambda m: ttnn.reduce_scatter(tiles(m, 1, 1, 32, 511), 3, cluster_axis=1),
        differs="ttnn gives parts of 63, which are not all of 511",
    ),
    Case(
        "reduce_scatter",
        "an uneven number of tiles",
        lambda m: ttnn.reduce_scatter(tiles(m, 1, 1, 32, 320), 3, cluster_axis=1),
    ),
    Case(
        "reduce_scatter",
        "an axis of one chip",
        lambda m: ttnn.reduce_scatter(tiles(m, 1, 1, 32, 512), 3, cluster_axis=0),
    ),
    Case("reduce_scatter", "a third axis", lambda m: ttnn.reduce_scatter(tiles(m, 1, 1, 32, 512), 3, cluster_axis=2)),
    Case(
        "reduce_scatter",
        "dimension out of range",
        lambda m: ttnn.reduce_scatter(tiles(m, 1, 1, 32, 512), 4, cluster_axis=1),
    ),
    Case("reduce_scatter", "ROW_MAJOR", lambda m: ttnn.reduce_scatter(rows(m, 1, 1, 32, 512), 3, cluster_axis=1)),
    Case(
        "reduce_scatter",
        "uint32",
        lambda m: ttnn.reduce_scatter(tiles(m, 1, 1, 32, 512, dtype=ttnn.uint32), 3, cluster_axis=1),
    ),
    Case("all_reduce", "latents of a row", lambda m: ttnn.all_reduce(tiles(m, 1, 1, 32, 2112), cluster_axis=1)),
    Case("all_reduce", "five tokens", lambda m: ttnn.all_reduce(tiles(m, 1, 1, 5, 2112), cluster_axis=1)),
    Case(
        "all_reduce",
        "into L1",
        lambda m: ttnn.all_reduce(tiles(m, 1, 1, 32, 512), cluster_axis=1, memory_config=ttnn.L1_MEMORY_CONFIG),
    ),
    Case("all_reduce", "all rows", lambda m: ttnn.all_reduce(tiles(m, 1, 1, 32, 512), cluster_axis=0), ALL_ROWS),
    Case("all_reduce", "an axis of one chip", lambda m: ttnn.all_reduce(tiles(m, 1, 1, 32, 512), cluster_axis=0)),
    Case("all_reduce", "a third axis", lambda m: ttnn.all_reduce(tiles(m, 1, 1, 32, 512), cluster_axis=2)),
    Case("all_reduce", "ROW_MAJOR", lambda m: ttnn.all_reduce(rows(m, 1, 1, 32, 512), cluster_axis=1)),
    Case("mesh_partition", "tokens", lambda m: ttnn.mesh_partition(tiles(m, 1, 1, 256, 64), 2, 1)),
    Case("mesh_partition", "users", lambda m: ttnn.mesh_partition(tiles(m, 1, 32, 1, 64), 1, 1)),
    Case("mesh_partition", "users of all rows", lambda m: ttnn.mesh_partition(tiles(m, 1, 32, 1, 64), 1, 0), ALL_ROWS),
    Case("mesh_partition", "ROW_MAJOR", lambda m: ttnn.mesh_partition(rows(m, 1, 1, 32, 64), 2, 1)),
    Case("mesh_partition", "tokens of no whole tiles", lambda m: ttnn.mesh_partition(tiles(m, 1, 1, 32, 64), 2, 1)),
    Case("mesh_partition", "an uneven part", lambda m: ttnn.mesh_partition(tiles(m, 1, 30, 1, 64), 1, 1)),
    Case(
        "mesh_partition",
        "an axis of one chip",
        lambda m: ttnn.mesh_partition(tiles(m, 1, 32, 1, 64), 1, 0),
        differs="all other collectives refuse it; the modules skip it",
    ),
    Case("mesh_partition", "a third axis", lambda m: ttnn.mesh_partition(tiles(m, 1, 32, 1, 64), 1, 2)),
    Case("mesh_partition", "dimension out of range", lambda m: ttnn.mesh_partition(tiles(m, 1, 32, 1, 64), 4, 1)),
    Case(
        "experimental.all_to_all_async_generic",
        "users for heads",
        lambda m: all_to_all(tiles(m, 1, 32, 16, 576), in_dim=2, out_dim=1),
    ),
    Case(
        "experimental.all_to_all_async_generic",
        "heads for users",
        lambda m: all_to_all(tiles(m, 1, 4, 128, 512), in_dim=1, out_dim=2),
    ),
    Case(
        "experimental.all_to_all_async_generic",
        "one user a chip",
        lambda m: all_to_all(tiles(m, 1, 8, 16, 576), in_dim=2, out_dim=1),
    ),
    Case(
        "experimental.all_to_all_async_generic",
        "heads for one user a chip",
        lambda m: all_to_all(tiles(m, 1, 1, 128, 512), in_dim=1, out_dim=2),
    ),
    Case("mesh_partition", "one user a chip", lambda m: ttnn.mesh_partition(tiles(m, 1, 8, 1, 64), 1, 1)),
    Case(
        "all_gather",
        "five tokens of all rows",
        lambda m: ttnn.all_gather(tiles(m, 1, 1, 5, 64), 2, cluster_axis=0),
        ALL_ROWS,
    ),
    Case(
        "reduce_scatter",
        "five tokens of all rows",
        lambda m: ttnn.reduce_scatter(tiles(m, 1, 1, 20, 64), 2, cluster_axis=0),
        ALL_ROWS,
    ),
    Case(
        "experimental.all_to_all_async_generic",
        "one head a chip",
        lambda m: all_to_all(tiles(m, 1, 32, 1, 576), in_dim=2, out_dim=1),
        differs="ttnn takes multiples of 16 heads a chip, the models of the tests have one or two",
    ),
    Case(
        "experimental.all_to_all_async_generic",
        "users for heads on a row of four",
        lambda m: all_to_all(tiles(m, 1, 32, 16, 576), in_dim=2, out_dim=1),
        ALL_ROWS,
    ),
    Case(
        "experimental.all_to_all_async_generic",
        "users of no even parts",
        lambda m: all_to_all(tiles(m, 1, 30, 16, 576), in_dim=2, out_dim=1),
    ),
    Case(
        "experimental.all_to_all_async_generic",
        "an axis of one chip",
        lambda m: all_to_all(tiles(m, 1, 32, 16, 576), in_dim=2, out_dim=1, cluster_axis=0),
    ),
    Case(
        "experimental.all_to_all_async_generic",
        "dimension out of range",
        lambda m: all_to_all(tiles(m, 1, 32, 16, 576), in_dim=4, out_dim=1),
    ),
    Case(
        "experimental.all_to_all_async_generic",
        "one dimension for itself",
        lambda m: all_to_all(tiles(m, 1, 32, 16, 576), in_dim=1, out_dim=1),
    ),
    Case(
        "experimental.all_to_all_async_generic",
        "ROW_MAJOR",
        lambda m: all_to_all(rows(m, 1, 32, 16, 576), in_dim=2, out_dim=1),
    ),
]
