"""Cases of attention over a paged latent cache."""

from stages.backend import ttnn
from tests.support.op_cases.caches import WIDTH, cache_of
from tests.support.op_cases.case import Case, rows, tiles, user_cores, zeros

VALUES = 512


def program(q_chunk: int, k_chunk: int) -> ttnn.SDPAProgramConfig:
    """Returns the configuration with which the modules call attention."""
    return ttnn.SDPAProgramConfig(
        compute_with_storage_grid_size=(8, 8),
        q_chunk_size=q_chunk,
        k_chunk_size=k_chunk,
        exp_approx_mode=False,
        max_cores_per_head_batch=1,
    )


def decode(
    q: ttnn.Tensor, cache: ttnn.Tensor, positions: ttnn.Tensor, pages: ttnn.Tensor, values: int = VALUES
) -> ttnn.Tensor:
    """Runs the op as decode does."""
    return ttnn.transformer.paged_flash_multi_latent_attention_decode(
        q,
        cache,
        head_dim_v=values,
        page_table_tensor=pages,
        cur_pos_tensor=positions,
        scale=0.1,
        program_config=program(0, 64),
    )


def prefill(
    q: ttnn.Tensor, cache: ttnn.Tensor, pages: ttnn.Tensor, start: int = 0, values: int = VALUES
) -> ttnn.Tensor:
    """Runs the op as prefill does."""
    return ttnn.transformer.chunked_flash_mla_prefill(
        q, cache, values, pages, start, scale=0.1, program_config=program(32, 32)
    )


DECODE = "transformer.paged_flash_multi_latent_attention_decode"
PREFILL = "transformer.chunked_flash_mla_prefill"

CASES = [
    Case(DECODE, "four users", lambda m: decode(tiles(m, 1, 4, 32, WIDTH), cache_of(m), zeros(m, 4), zeros(m, 4, 4))),
    Case(DECODE, "one user", lambda m: decode(tiles(m, 1, 1, 32, WIDTH), cache_of(m), zeros(m, 1), zeros(m, 1, 4))),
    Case(PREFILL, "five tokens", lambda m: prefill(tiles(m, 1, 16, 5, WIDTH), cache_of(m), zeros(m, 1, 2))),
    Case(
        DECODE,
        "a tile of heads on each core",
        lambda m: decode(
            ttnn.to_memory_config(tiles(m, 1, 4, 128, WIDTH), user_cores(16, WIDTH)),
            cache_of(m),
            zeros(m, 4),
            zeros(m, 4, 4),
        ),
    ),
    Case(DECODE, "five heads", lambda m: decode(tiles(m, 1, 4, 5, WIDTH), cache_of(m), zeros(m, 4), zeros(m, 4, 4))),
    Case(
        DECODE,
        "all heads of R1",
        lambda m: decode(tiles(m, 1, 4, 128, WIDTH), cache_of(m), zeros(m, 4), zeros(m, 4, 4)),
    ),
    Case(
        DECODE,
        "bfloat16 cache",
        lambda m: decode(tiles(m, 1, 4, 32, WIDTH), cache_of(m, dtype=ttnn.bfloat16), zeros(m, 4), zeros(m, 4, 4)),
    ),
    Case(
        DECODE,
        "q of another width",
        lambda m: decode(tiles(m, 1, 4, 32, 512), cache_of(m), zeros(m, 4), zeros(m, 4, 4)),
    ),
    Case(
        DECODE,
        "positions of more users",
        lambda m: decode(tiles(m, 1, 4, 32, WIDTH), cache_of(m), zeros(m, 8), zeros(m, 8, 4)),
        differs="ttnn takes the batch of the positions, and q's vectors for other users'",
    ),
    Case(
        DECODE,
        "positions of fewer users",
        lambda m: decode(tiles(m, 1, 4, 32, WIDTH), cache_of(m), zeros(m, 3), zeros(m, 3, 4)),
        differs="ttnn drops the users that have none",
    ),
    Case(
        DECODE,
        "pages of fewer users",
        lambda m: decode(tiles(m, 1, 4, 32, WIDTH), cache_of(m), zeros(m, 4), zeros(m, 3, 4)),
    ),
    Case(
        DECODE,
        "uint32 positions",
        lambda m: decode(tiles(m, 1, 4, 32, WIDTH), cache_of(m), zeros(m, 4, dtype=ttnn.uint32), zeros(m, 4, 4)),
    ),
    Case(
        DECODE,
        "bfloat16 positions",
        lambda m: decode(tiles(m, 1, 4, 32, WIDTH), cache_of(m), zeros(m, 4, dtype=ttnn.bfloat16), zeros(m, 4, 4)),
    ),
    Case(
        DECODE,
        "uint32 pages",
        lambda m: decode(tiles(m, 1, 4, 32, WIDTH), cache_of(m), zeros(m, 4), zeros(m, 4, 4, dtype=ttnn.uint32)),
    ),
    Case(
        DECODE,
        "bfloat16 pages",
        lambda m: decode(tiles(m, 1, 4, 32, WIDTH), cache_of(m), zeros(m, 4), zeros(m, 4, 4, dtype=ttnn.bfloat16)),
    ),
    Case(
        DECODE,
        "pages in TILE",
        lambda m: decode(tiles(m, 1, 4, 32, WIDTH), cache_of(m), zeros(m, 4), tiles(m, 4, 4, dtype=ttnn.int32)),
    ),
    Case(
        DECODE,
        "q in ROW_MAJOR",
        lambda m: decode(rows(m, 1, 4, 32, WIDTH), cache_of(m), zeros(m, 4), zeros(m, 4, 4)),
    ),
    Case(
        DECODE,
        "float32 q",
        lambda m: decode(tiles(m, 1, 4, 32, WIDTH, dtype=ttnn.float32), cache_of(m), zeros(m, 4), zeros(m, 4, 4)),
    ),
    Case(
        DECODE,
        "uint32 q",
        lambda m: decode(tiles(m, 1, 4, 32, WIDTH, dtype=ttnn.uint32), cache_of(m), zeros(m, 4), zeros(m, 4, 4)),
    ),
    Case(
        DECODE,
        "values of no whole tiles",
        lambda m: decode(tiles(m, 1, 4, 32, WIDTH), cache_of(m), zeros(m, 4), zeros(m, 4, 4), 500),
        differs="the tile at the end would hold other values of the key",
    ),
    Case(
        DECODE,
        "values wider than the cache",
        lambda m: decode(tiles(m, 1, 4, 32, WIDTH), cache_of(m), zeros(m, 4), zeros(m, 4, 4), 608),
    ),
    Case(
        DECODE,
        "q of a batch of two",
        lambda m: decode(tiles(m, 2, 4, 32, WIDTH), cache_of(m), zeros(m, 4), zeros(m, 4, 4)),
        differs="users are on dimension 1",
    ),
    Case(
        DECODE,
        "q of three dimensions",
        lambda m: decode(tiles(m, 4, 32, WIDTH), cache_of(m), zeros(m, 4), zeros(m, 4, 4)),
    ),
    Case(PREFILL, "the first chunk", lambda m: prefill(tiles(m, 1, 16, 64, WIDTH), cache_of(m), zeros(m, 1, 2))),
    Case(PREFILL, "a later chunk", lambda m: prefill(tiles(m, 1, 16, 64, WIDTH), cache_of(m), zeros(m, 1, 4), 64)),
    Case(
        PREFILL,
        "pages to spare",
        lambda m: prefill(tiles(m, 1, 16, 64, WIDTH), cache_of(m), zeros(m, 1, 8), 64),
    ),
    Case(PREFILL, "five heads", lambda m: prefill(tiles(m, 1, 5, 64, WIDTH), cache_of(m), zeros(m, 1, 2))),
    Case(
        PREFILL, "a chunk of no whole tiles", lambda m: prefill(tiles(m, 1, 16, 40, WIDTH), cache_of(m), zeros(m, 1, 2))
    ),
    Case(
        PREFILL,
        "bfloat16 cache",
        lambda m: prefill(tiles(m, 1, 16, 64, WIDTH), cache_of(m, dtype=ttnn.bfloat16), zeros(m, 1, 2)),
    ),
    Case(
        PREFILL,
        "q of another width",
        lambda m: prefill(tiles(m, 1, 16, 64, 512), cache_of(m), zeros(m, 1, 2)),
        differs="scores would be of a part of the key",
    ),
    Case(
        PREFILL,
        "a start that is not a multiple of 32",
        lambda m: prefill(tiles(m, 1, 16, 64, WIDTH), cache_of(m), zeros(m, 1, 4), 40),
    ),
    Case(PREFILL, "a negative start", lambda m: prefill(tiles(m, 1, 16, 64, WIDTH), cache_of(m), zeros(m, 1, 4), -32)),
    Case(
        PREFILL,
        "pages that do not reach",
        lambda m: prefill(tiles(m, 1, 16, 64, WIDTH), cache_of(m), zeros(m, 1, 2), 64),
    ),
    Case(PREFILL, "pages of two users", lambda m: prefill(tiles(m, 1, 16, 64, WIDTH), cache_of(m), zeros(m, 2, 2))),
    Case(
        PREFILL,
        "uint32 pages",
        lambda m: prefill(tiles(m, 1, 16, 64, WIDTH), cache_of(m), zeros(m, 1, 2, dtype=ttnn.uint32)),
    ),
    Case(
        PREFILL,
        "bfloat16 pages",
        lambda m: prefill(tiles(m, 1, 16, 64, WIDTH), cache_of(m), zeros(m, 1, 2, dtype=ttnn.bfloat16)),
    ),
    Case(
        PREFILL,
        "pages in TILE",
        lambda m: prefill(tiles(m, 1, 16, 64, WIDTH), cache_of(m), tiles(m, 1, 2, dtype=ttnn.int32)),
    ),
    Case(PREFILL, "q in ROW_MAJOR", lambda m: prefill(rows(m, 1, 16, 64, WIDTH), cache_of(m), zeros(m, 1, 2))),
    Case(
        PREFILL,
        "float32 q",
        lambda m: prefill(tiles(m, 1, 16, 64, WIDTH, dtype=ttnn.float32), cache_of(m), zeros(m, 1, 2)),
    ),
    Case(
        PREFILL,
        "values of no whole tiles",
        lambda m: prefill(tiles(m, 1, 16, 64, WIDTH), cache_of(m), zeros(m, 1, 2), 0, 500),
        differs="the tile at the end would hold other values of the key",
    ),
    Case(
        PREFILL,
        "values wider than the cache",
        lambda m: prefill(tiles(m, 1, 16, 64, WIDTH), cache_of(m), zeros(m, 1, 2), 0, 608),
        differs="the cache has no such values",
    ),
]
