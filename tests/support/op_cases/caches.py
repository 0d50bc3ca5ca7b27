"""Cases of rotary embeddings and writes to a paged cache."""

from stages.backend import ttnn
from tests.support.op_cases.case import Case, rows, tiles, user_cores, zeros

WIDTH = 576


def rotate(
    x: ttnn.Tensor, cos: ttnn.Tensor, sin: ttnn.Tensor, trans_mat: ttnn.Tensor, is_decode_mode: bool = False
) -> ttnn.Tensor:
    """Runs the op as attention does."""
    return ttnn.experimental.rotary_embedding_llama(x, cos, sin, trans_mat, is_decode_mode=is_decode_mode)


def cache_of(mesh: ttnn.MeshDevice, width: int = WIDTH, dtype: ttnn.DataType = ttnn.bfloat8_b) -> ttnn.Tensor:
    """A cache of nine blocks of 32 tokens."""
    return ttnn.zeros((9, 1, 32, width), dtype=dtype, layout=ttnn.TILE_LAYOUT, device=mesh)


def users(
    mesh: ttnn.MeshDevice, count: int = 4, width: int = WIDTH, dtype: ttnn.DataType = ttnn.bfloat16
) -> ttnn.Tensor:
    """One vector for each user, on a core for each user."""
    return ttnn.to_memory_config(tiles(mesh, 1, count, 1, width, dtype=dtype), user_cores(count, width))


def update(cache: ttnn.Tensor, vectors: ttnn.Tensor, positions: ttnn.Tensor, pages: ttnn.Tensor) -> ttnn.Tensor:
    """Runs the op as decode does."""
    return ttnn.experimental.paged_update_cache(cache, vectors, update_idxs_tensor=positions, page_table=pages)


def fill(cache: ttnn.Tensor, chunk: ttnn.Tensor, pages: ttnn.Tensor, batch_idx: int = 0) -> ttnn.Tensor:
    """Runs the op as prefill does."""
    return ttnn.experimental.paged_fill_cache(cache, chunk, pages, batch_idx=batch_idx)


ROTARY = "experimental.rotary_embedding_llama"
UPDATE = "experimental.paged_update_cache"
FILL = "experimental.paged_fill_cache"

CASES = [
    Case(
        ROTARY,
        "queries",
        lambda m: rotate(
            tiles(m, 1, 4, 32, 64), tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 32)
        ),
    ),
    Case(
        ROTARY,
        "five tokens",
        lambda m: rotate(tiles(m, 1, 4, 5, 64), tiles(m, 1, 1, 5, 64), tiles(m, 1, 1, 5, 64), tiles(m, 1, 1, 32, 32)),
    ),
    Case(
        ROTARY,
        "cos and sin of more tokens",
        lambda m: rotate(
            tiles(m, 1, 4, 32, 64), tiles(m, 1, 1, 64, 64), tiles(m, 1, 1, 64, 64), tiles(m, 1, 1, 32, 32)
        ),
        differs="they are another step's: ttnn takes the first ones",
    ),
    Case(
        ROTARY,
        "cos and sin of fewer tokens",
        lambda m: rotate(
            tiles(m, 1, 4, 64, 64), tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 32)
        ),
        differs="ttnn reads beyond their end",
    ),
    Case(
        ROTARY,
        "cos and sin of another width",
        lambda m: rotate(
            tiles(m, 1, 4, 32, 64), tiles(m, 1, 1, 32, 32), tiles(m, 1, 1, 32, 32), tiles(m, 1, 1, 32, 32)
        ),
    ),
    Case(
        ROTARY,
        "cos and sin that differ in shape",
        lambda m: rotate(
            tiles(m, 1, 4, 32, 64), tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 64, 64), tiles(m, 1, 1, 32, 32)
        ),
    ),
    Case(
        ROTARY,
        "cos and sin a head",
        lambda m: rotate(
            tiles(m, 1, 4, 32, 64), tiles(m, 1, 4, 32, 64), tiles(m, 1, 4, 32, 64), tiles(m, 1, 1, 32, 32)
        ),
        differs="heads of one token have one position",
    ),
    Case(
        ROTARY,
        "a matrix of two tiles",
        lambda m: rotate(
            tiles(m, 1, 4, 32, 64), tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 64)
        ),
    ),
    Case(
        ROTARY,
        "a batch of two",
        lambda m: rotate(
            tiles(m, 2, 4, 32, 64), tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 32)
        ),
        differs="the modules keep users and tokens on dimension 2",
    ),
    Case(
        ROTARY,
        "float32 queries",
        lambda m: rotate(
            tiles(m, 1, 4, 32, 64, dtype=ttnn.float32),
            tiles(m, 1, 1, 32, 64),
            tiles(m, 1, 1, 32, 64),
            tiles(m, 1, 1, 32, 32),
        ),
    ),
    Case(
        ROTARY,
        "bfloat8_b queries",
        lambda m: rotate(
            tiles(m, 1, 4, 32, 64, dtype=ttnn.bfloat8_b),
            tiles(m, 1, 1, 32, 64),
            tiles(m, 1, 1, 32, 64),
            tiles(m, 1, 1, 32, 32),
        ),
    ),
    Case(
        ROTARY,
        "queries in ROW_MAJOR",
        lambda m: rotate(rows(m, 1, 4, 32, 64), tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 32)),
    ),
    Case(
        ROTARY,
        "cos and sin in ROW_MAJOR",
        lambda m: rotate(tiles(m, 1, 4, 32, 64), rows(m, 1, 1, 32, 64), rows(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 32)),
    ),
    Case(
        ROTARY,
        "decode mode of what is not sharded",
        lambda m: rotate(
            tiles(m, 1, 4, 32, 64), tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 64), tiles(m, 1, 1, 32, 32), True
        ),
    ),
    Case(UPDATE, "a vector a user", lambda m: update(cache_of(m), users(m), zeros(m, 4), zeros(m, 4, 2))),
    Case(
        UPDATE,
        "bfloat16 cache",
        lambda m: update(cache_of(m, dtype=ttnn.bfloat16), users(m), zeros(m, 4), zeros(m, 4, 2)),
    ),
    Case(
        UPDATE,
        "float32 vectors",
        lambda m: update(cache_of(m), users(m, dtype=ttnn.float32), zeros(m, 4), zeros(m, 4, 2)),
    ),
    Case(
        UPDATE,
        "a tile a user",
        lambda m: update(
            cache_of(m),
            ttnn.to_memory_config(tiles(m, 1, 4, 32, WIDTH), user_cores(4, WIDTH)),
            zeros(m, 4),
            zeros(m, 4, 2),
        ),
    ),
    Case(
        UPDATE,
        "a cache of no whole tiles",
        lambda m: update(
            cache_of(m, width=112),
            ttnn.to_memory_config(tiles(m, 1, 4, 1, 112), user_cores(4, 128)),
            zeros(m, 4),
            zeros(m, 4, 2),
        ),
    ),
    Case(
        UPDATE,
        "bfloat8_b vectors",
        lambda m: update(cache_of(m), users(m, dtype=ttnn.bfloat8_b), zeros(m, 4), zeros(m, 4, 2)),
    ),
    Case(
        UPDATE,
        "vectors of another width",
        lambda m: update(cache_of(m), users(m, width=512), zeros(m, 4), zeros(m, 4, 2)),
    ),
    Case(UPDATE, "positions of fewer users", lambda m: update(cache_of(m), users(m), zeros(m, 3), zeros(m, 4, 2))),
    Case(UPDATE, "positions of more users", lambda m: update(cache_of(m), users(m), zeros(m, 5), zeros(m, 5, 2))),
    Case(UPDATE, "pages of fewer users", lambda m: update(cache_of(m), users(m), zeros(m, 4), zeros(m, 3, 2))),
    Case(
        UPDATE,
        "uint32 positions",
        lambda m: update(cache_of(m), users(m), zeros(m, 4, dtype=ttnn.uint32), zeros(m, 4, 2)),
    ),
    Case(
        UPDATE,
        "bfloat16 positions",
        lambda m: update(cache_of(m), users(m), zeros(m, 4, dtype=ttnn.bfloat16), zeros(m, 4, 2)),
    ),
    Case(
        UPDATE, "uint32 pages", lambda m: update(cache_of(m), users(m), zeros(m, 4), zeros(m, 4, 2, dtype=ttnn.uint32))
    ),
    Case(
        UPDATE,
        "bfloat16 pages",
        lambda m: update(cache_of(m), users(m), zeros(m, 4), zeros(m, 4, 2, dtype=ttnn.bfloat16)),
    ),
    Case(
        UPDATE, "pages in TILE", lambda m: update(cache_of(m), users(m), zeros(m, 4), tiles(m, 4, 2, dtype=ttnn.int32))
    ),
    Case(
        UPDATE,
        "positions in TILE",
        lambda m: update(cache_of(m), users(m), tiles(m, 4, dtype=ttnn.int32), zeros(m, 4, 2)),
    ),
    Case(UPDATE, "pages [4]", lambda m: update(cache_of(m), users(m), zeros(m, 4), zeros(m, 4))),
    Case(UPDATE, "positions [1, 4]", lambda m: update(cache_of(m), users(m), zeros(m, 1, 4), zeros(m, 4, 2))),
    Case(
        UPDATE,
        "vectors in ROW_MAJOR",
        lambda m: update(cache_of(m), rows(m, 1, 4, 1, WIDTH), zeros(m, 4), zeros(m, 4, 2)),
    ),
    Case(
        UPDATE,
        "vectors not sharded",
        lambda m: update(cache_of(m), tiles(m, 1, 4, 1, WIDTH), zeros(m, 4), zeros(m, 4, 2)),
    ),
    Case(
        UPDATE,
        "cache in ROW_MAJOR",
        lambda m: update(rows(m, 9, 1, 32, WIDTH), users(m), zeros(m, 4), zeros(m, 4, 2)),
    ),
    Case(
        FILL,
        "a chunk",
        lambda m: fill(cache_of(m), tiles(m, 1, 1, 64, WIDTH, dtype=ttnn.bfloat8_b), zeros(m, 1, 2)),
    ),
    Case(
        FILL,
        "the second user's",
        lambda m: fill(cache_of(m), tiles(m, 1, 1, 64, WIDTH, dtype=ttnn.bfloat8_b), zeros(m, 2, 2), 1),
    ),
    Case(
        FILL,
        "a chunk that ends within a block",
        lambda m: fill(cache_of(m), tiles(m, 1, 1, 40, WIDTH, dtype=ttnn.bfloat8_b), zeros(m, 1, 2)),
    ),
    Case(FILL, "another dtype", lambda m: fill(cache_of(m), tiles(m, 1, 1, 64, WIDTH), zeros(m, 1, 2))),
    Case(
        FILL,
        "another width",
        lambda m: fill(cache_of(m), tiles(m, 1, 1, 64, 512, dtype=ttnn.bfloat8_b), zeros(m, 1, 2)),
    ),
    Case(
        FILL,
        "more tokens than pages",
        lambda m: fill(cache_of(m), tiles(m, 1, 1, 96, WIDTH, dtype=ttnn.bfloat8_b), zeros(m, 1, 2)),
    ),
    Case(
        FILL,
        "a user without pages",
        lambda m: fill(cache_of(m), tiles(m, 1, 1, 64, WIDTH, dtype=ttnn.bfloat8_b), zeros(m, 1, 2), 1),
    ),
    Case(
        FILL,
        "uint32 pages",
        lambda m: fill(cache_of(m), tiles(m, 1, 1, 64, WIDTH, dtype=ttnn.bfloat8_b), zeros(m, 1, 2, dtype=ttnn.uint32)),
    ),
    Case(
        FILL,
        "bfloat16 pages",
        lambda m: fill(
            cache_of(m), tiles(m, 1, 1, 64, WIDTH, dtype=ttnn.bfloat8_b), zeros(m, 1, 2, dtype=ttnn.bfloat16)
        ),
    ),
    Case(
        FILL,
        "pages in TILE",
        lambda m: fill(cache_of(m), tiles(m, 1, 1, 64, WIDTH, dtype=ttnn.bfloat8_b), tiles(m, 1, 2, dtype=ttnn.int32)),
        differs="other ops refuse such pages: a kernel reads a row of them, not a tile",
    ),
    Case(FILL, "pages [2]", lambda m: fill(cache_of(m), tiles(m, 1, 1, 64, WIDTH, dtype=ttnn.bfloat8_b), zeros(m, 2))),
    Case(
        FILL,
        "two heads",
        lambda m: fill(cache_of(m), tiles(m, 1, 2, 64, WIDTH, dtype=ttnn.bfloat8_b), zeros(m, 1, 2)),
    ),
    Case(
        FILL,
        "two sequences",
        lambda m: fill(cache_of(m), tiles(m, 2, 1, 64, WIDTH, dtype=ttnn.bfloat8_b), zeros(m, 2, 2)),
    ),
    Case(
        FILL,
        "chunk in ROW_MAJOR",
        lambda m: fill(cache_of(m, dtype=ttnn.bfloat16), rows(m, 1, 1, 64, WIDTH), zeros(m, 1, 2)),
        differs="a kernel moves whole tiles: rows would be stored as if they were some",
    ),
]
