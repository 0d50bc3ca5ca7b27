"""Cases of ops that do in one program what several would: products with collectives, heads, norms and routing."""

from typing import Any

from stages.backend import ttnn
from stages.backend.fused import NormBuffers, gathered_linear, residual_norm, semaphores
from tests.support.op_cases.case import Case, rows, tiles

HIDDEN = 2048
"""A hidden size of which each of eight columns has whole tiles."""


def gathered(mesh: ttnn.MeshDevice, *weight: int, **options: Any) -> object:
    """Calls the product of gathered inputs as the modules do."""
    return gathered_linear(tiles(mesh, 1, 1, 32, 256), semaphores(mesh), input_tensor_b=tiles(mesh, *weight), **options)


def normed(mesh: ttnn.MeshDevice, tokens: int, *residual: int) -> object:
    """Calls the norm of a row's shared hidden states as the modules do."""
    buffers = NormBuffers.on(mesh, HIDDEN)
    assert buffers is not None
    x = ttnn.to_memory_config(tiles(mesh, 1, 1, tokens, 256), buffers.memory_config)
    added = ttnn.to_memory_config(tiles(mesh, *residual), buffers.memory_config) if residual else None
    return residual_norm(x, buffers, epsilon=1e-6, weight=rows(mesh, 1, 1, 8, 32), residual=added)


def rotated(mesh: ttnn.MeshDevice, *prefix: int, begin: int = 0) -> object:
    """Rotates values of 16 heads and puts them behind a prefix."""
    x, table, pairs = (tiles(mesh, *shape) for shape in ((1, 16, 32, 64), (1, 1, 32, 64), (1, 1, 32, 32)))
    return ttnn.experimental.deepseek_prefill.rotary_embedding_indexed(
        x, table, table, pairs, begin, 1, concat_prefix=tiles(mesh, *prefix)
    )


def chosen(mesh: ttnn.MeshDevice, experts: int, bias_rows: int = 32, dtype: ttnn.DataType = ttnn.float32) -> object:
    """Chooses experts as the mixture does on chips."""
    return ttnn.experimental.deepseek_prefill.moe_grouped_topk(
        tiles(mesh, 1, 1, 32, experts, dtype=dtype),
        tiles(mesh, 1, 1, bias_rows, experts, dtype=dtype),
        n_groups=8,
        summed_experts_per_group=2,
        topk_groups=4,
        n_activated_experts=8,
        route_scale=2.5,
        epsilon=1e-20,
        weights_layout=ttnn.ROW_MAJOR_LAYOUT,
    )


GATHERED = "experimental.all_gather_minimal_matmul_async"
PRODUCT = "experimental.minimal_matmul"
SPLIT = "experimental.nlp_create_q_heads_split"
CONCAT = "experimental.nlp_concat_heads"
ROTATED = "experimental.deepseek_prefill.rotary_embedding_indexed"
CHOSEN = "experimental.deepseek_prefill.moe_grouped_topk"

CASES = [
    Case(GATHERED, "one product", lambda m: gathered(m, 1, 1, HIDDEN, 192)),
    Case(GATHERED, "columns in parts", lambda m: gathered(m, 1, 1, HIDDEN, 192, chunk_sizes=(96, 64, 32))),
    Case(GATHERED, "pairs of tiles", lambda m: gathered(m, 1, 1, HIDDEN, 256, fuse_swiglu=True)),
    Case(GATHERED, "a weight of a column", lambda m: gathered(m, 1, 1, 256, 192)),
    Case(GATHERED, "parts of fewer columns", lambda m: gathered(m, 1, 1, HIDDEN, 192, chunk_sizes=(96, 64))),
    Case(
        PRODUCT,
        "pairs of tiles",
        lambda m: ttnn.experimental.minimal_matmul(tiles(m, 1, 1, 32, 256), tiles(m, 1, 1, 256, 128), fuse_swiglu=True),
    ),
    Case(
        PRODUCT,
        "tiles without a pair",
        lambda m: ttnn.experimental.minimal_matmul(tiles(m, 1, 1, 32, 256), tiles(m, 1, 1, 256, 96), fuse_swiglu=True),
    ),
    Case(
        PRODUCT,
        "several matrices",
        lambda m: ttnn.experimental.minimal_matmul(tiles(m, 1, 1, 32, 256), tiles(m, 1, 2, 256, 128)),
    ),
    Case("fused_rms_minimal", "a tile of tokens", lambda m: normed(m, 32)),
    Case("fused_rms_minimal", "with a residual", lambda m: normed(m, 32, 1, 1, 32, 256)),
    Case(
        "fused_rms_minimal",
        "gains in tiles",
        lambda m: residual_norm(tiles(m, 1, 1, 32, 256), _buffers(m), epsilon=1e-6, weight=tiles(m, 1, 1, 1, 256)),
    ),
    Case(
        SPLIT,
        "16 heads of R1",
        lambda m: ttnn.experimental.nlp_create_q_heads_split(
            tiles(m, 1, 1, 32, 16 * 192), num_heads=16, split_head_dim=128
        ),
    ),
    Case(
        SPLIT,
        "heads cut within a tile",
        lambda m: ttnn.experimental.nlp_create_q_heads_split(
            tiles(m, 1, 1, 32, 4 * 96), num_heads=4, split_head_dim=40
        ),
    ),
    Case(CONCAT, "16 heads of R1", lambda m: ttnn.experimental.nlp_concat_heads(tiles(m, 1, 16, 32, 128))),
    Case(
        CONCAT,
        "ROW_MAJOR",
        lambda m: ttnn.experimental.nlp_concat_heads(rows(m, 1, 16, 32, 128)),
    ),
    Case(ROTATED, "queries of R1", lambda m: rotated(m, 1, 16, 32, 512)),
    Case(ROTATED, "a prefix of other heads", lambda m: rotated(m, 1, 8, 32, 512)),
    Case(CHOSEN, "256 experts", lambda m: chosen(m, 256)),
    Case(CHOSEN, "256 experts in bfloat16", lambda m: chosen(m, 256, dtype=ttnn.bfloat16)),
    Case(CHOSEN, "128 experts", lambda m: chosen(m, 128)),
    Case(CHOSEN, "one row of bias", lambda m: chosen(m, 256, bias_rows=1)),
]


def _buffers(mesh: ttnn.MeshDevice) -> NormBuffers:
    buffers = NormBuffers.on(mesh, HIDDEN)
    assert buffers is not None
    return buffers
