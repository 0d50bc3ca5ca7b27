"""Cases of ops that choose: embedding, gather, scatter, reductions, routing."""

from stages.backend import ttnn
from tests.support.op_cases.case import Case, rows, tiles, zeros


def ids(mesh: ttnn.MeshDevice, *shape: int, dtype: ttnn.DataType = ttnn.uint32) -> ttnn.Tensor:
    """Ids in the form in which the batch builder makes them."""
    return zeros(mesh, *shape, dtype=dtype)


def picks(mesh: ttnn.MeshDevice, *shape: int, dtype: ttnn.DataType = ttnn.uint16) -> ttnn.Tensor:
    """Indices in the form in which topk returns them."""
    return ttnn.zeros(shape, dtype=dtype, layout=ttnn.TILE_LAYOUT, device=mesh)


def gate(
    scores: ttnn.Tensor,
    bias: ttnn.Tensor,
    *,
    n_groups: int = 8,
    summed_experts_per_group: int = 2,
    topk_groups: int = 4,
    n_activated_experts: int = 8,
) -> tuple[ttnn.Tensor, ttnn.Tensor]:
    """Calls the gate with DeepSeek-V3's numbers, except those in the arguments."""
    return ttnn.experimental.deepseek_grouped_gate(
        scores,
        bias,
        n_groups=n_groups,
        summed_experts_per_group=summed_experts_per_group,
        topk_groups=topk_groups,
        n_activated_experts=n_activated_experts,
        route_scale=2.5,
        epsilon=1e-20,
    )


CASES = [
    Case(
        "embedding",
        "tokens",
        lambda m: ttnn.embedding(ids(m, 1, 32), rows(m, 128, 64), layout=ttnn.TILE_LAYOUT),
    ),
    Case("embedding", "layout not said", lambda m: ttnn.embedding(ids(m, 1, 32), rows(m, 128, 64))),
    Case(
        "embedding",
        "five tokens into L1",
        lambda m: ttnn.embedding(
            ids(m, 1, 5), rows(m, 128, 64), layout=ttnn.TILE_LAYOUT, memory_config=ttnn.L1_MEMORY_CONFIG
        ),
    ),
    Case("embedding", "ids [B, 1, 1, T]", lambda m: ttnn.embedding(ids(m, 2, 1, 1, 32), rows(m, 128, 64))),
    Case("embedding", "table [1, 1, V, D]", lambda m: ttnn.embedding(ids(m, 1, 32), rows(m, 1, 1, 128, 64))),
    Case(
        "embedding",
        "ids [T]",
        lambda m: ttnn.embedding(ids(m, 32), rows(m, 128, 64)),
        differs="ttnn gives [T, D]: another rank than for one row of ids",
    ),
    Case(
        "embedding",
        "ids [B, 2, T]",
        lambda m: ttnn.embedding(ids(m, 1, 2, 32), rows(m, 128, 64)),
        differs="ttnn looks up the first 32 ids and drops the rest",
    ),
    Case("embedding", "int32 ids", lambda m: ttnn.embedding(ids(m, 1, 32, dtype=ttnn.int32), rows(m, 128, 64))),
    Case(
        "embedding",
        "bfloat16 ids",
        lambda m: ttnn.embedding(ids(m, 1, 32, dtype=ttnn.bfloat16), rows(m, 128, 64)),
        differs="ttnn takes them and rounds ids above 256",
    ),
    Case("embedding", "table in TILE", lambda m: ttnn.embedding(ids(m, 1, 32), tiles(m, 128, 64))),
    Case(
        "embedding", "bfloat8_b table", lambda m: ttnn.embedding(ids(m, 1, 32), tiles(m, 128, 64, dtype=ttnn.bfloat8_b))
    ),
    Case("embedding", "float32 table", lambda m: ttnn.embedding(ids(m, 1, 32), rows(m, 128, 64, dtype=ttnn.float32))),
    Case("embedding", "table [2, 1, V, D]", lambda m: ttnn.embedding(ids(m, 1, 32), rows(m, 2, 1, 128, 64))),
    Case(
        "gather", "scores of the chosen", lambda m: ttnn.gather(tiles(m, 1, 1, 32, 64), -1, index=picks(m, 1, 1, 32, 8))
    ),
    Case(
        "gather",
        "uint32 indices",
        lambda m: ttnn.gather(tiles(m, 1, 1, 32, 64), -1, index=picks(m, 1, 1, 32, 8, dtype=ttnn.uint32)),
    ),
    Case("gather", "five tokens", lambda m: ttnn.gather(tiles(m, 1, 1, 5, 40), -1, index=picks(m, 1, 1, 5, 8))),
    Case(
        "scatter",
        "five tokens",
        lambda m: ttnn.scatter(tiles(m, 1, 1, 5, 40), -1, picks(m, 1, 1, 5, 8), tiles(m, 1, 1, 5, 8)),
    ),
    Case("sum", "five tokens", lambda m: ttnn.sum(tiles(m, 1, 1, 5, 8), dim=-1, keepdim=True)),
    Case("sum", "groups of five tokens", lambda m: ttnn.sum(tiles(m, 1, 5, 8, 2), dim=-1)),
    Case("topk", "five tokens", lambda m: ttnn.topk(tiles(m, 1, 1, 5, 40), 8, dim=-1)),
    Case("argmax", "five tokens", lambda m: ttnn.argmax(rows(m, 1, 1, 5, 40), dim=-1)),
    Case("softmax", "five tokens", lambda m: ttnn.softmax(tiles(m, 1, 1, 5, 40), dim=-1)),
    Case(
        "experimental.fast_reduce_nc",
        "five tokens",
        lambda m: ttnn.experimental.fast_reduce_nc(tiles(m, 1, 4, 5, 40), dims=[1]),
    ),
    Case(
        "gather",
        "int32 indices",
        lambda m: ttnn.gather(tiles(m, 1, 1, 32, 64), -1, index=picks(m, 1, 1, 32, 8, dtype=ttnn.int32)),
    ),
    Case(
        "gather",
        "indices of more tokens",
        lambda m: ttnn.gather(tiles(m, 1, 1, 32, 64), -1, index=picks(m, 1, 1, 64, 8)),
    ),
    Case("gather", "indices of another rank", lambda m: ttnn.gather(tiles(m, 1, 1, 32, 64), -1, index=picks(m, 32, 8))),
    Case(
        "gather",
        "both in ROW_MAJOR",
        lambda m: ttnn.gather(rows(m, 1, 1, 32, 64), -1, index=zeros(m, 1, 1, 32, 8, dtype=ttnn.uint16)),
    ),
    Case("gather", "ROW_MAJOR", lambda m: ttnn.gather(rows(m, 1, 1, 32, 64), -1, index=picks(m, 1, 1, 32, 8))),
    Case(
        "gather",
        "dimension out of range",
        lambda m: ttnn.gather(tiles(m, 1, 1, 32, 64), 4, index=picks(m, 1, 1, 32, 8)),
    ),
    Case(
        "scatter",
        "weights to all experts",
        lambda m: ttnn.scatter(tiles(m, 1, 1, 32, 64), -1, picks(m, 1, 1, 32, 8), tiles(m, 1, 1, 32, 8)),
    ),
    Case(
        "scatter",
        "uint32 indices",
        lambda m: ttnn.scatter(
            tiles(m, 1, 1, 32, 64), -1, picks(m, 1, 1, 32, 8, dtype=ttnn.uint32), tiles(m, 1, 1, 32, 8)
        ),
    ),
    Case(
        "scatter",
        "float32 into float32",
        lambda m: ttnn.scatter(
            tiles(m, 1, 1, 32, 64, dtype=ttnn.float32),
            -1,
            picks(m, 1, 1, 32, 8),
            tiles(m, 1, 1, 32, 8, dtype=ttnn.float32),
        ),
    ),
    Case(
        "scatter",
        "float32 into bfloat16",
        lambda m: ttnn.scatter(
            tiles(m, 1, 1, 32, 64), -1, picks(m, 1, 1, 32, 8), tiles(m, 1, 1, 32, 8, dtype=ttnn.float32)
        ),
    ),
    Case(
        "scatter",
        "indices in ROW_MAJOR",
        lambda m: ttnn.scatter(
            tiles(m, 1, 1, 32, 64), -1, zeros(m, 1, 1, 32, 8, dtype=ttnn.uint16), tiles(m, 1, 1, 32, 8)
        ),
    ),
    Case(
        "scatter",
        "float32 in ROW_MAJOR",
        lambda m: ttnn.scatter(
            rows(m, 1, 1, 32, 64, dtype=ttnn.float32),
            -1,
            zeros(m, 1, 1, 32, 8, dtype=ttnn.uint16),
            rows(m, 1, 1, 32, 8, dtype=ttnn.float32),
        ),
    ),
    Case(
        "scatter",
        "bfloat16 indices",
        lambda m: ttnn.scatter(tiles(m, 1, 1, 32, 64), -1, tiles(m, 1, 1, 32, 8), tiles(m, 1, 1, 32, 8)),
    ),
    Case(
        "scatter",
        "indices of more tokens",
        lambda m: ttnn.scatter(tiles(m, 1, 1, 32, 64), -1, picks(m, 1, 1, 64, 8), tiles(m, 1, 1, 64, 8)),
    ),
    Case(
        "scatter",
        "fewer values than indices",
        lambda m: ttnn.scatter(tiles(m, 1, 1, 32, 64), -1, picks(m, 1, 1, 32, 8), tiles(m, 1, 1, 32, 4)),
    ),
    Case("sum", "weights of a token", lambda m: ttnn.sum(tiles(m, 1, 1, 32, 8), dim=-1, keepdim=True)),
    Case("sum", "without the dimension", lambda m: ttnn.sum(tiles(m, 1, 32, 8, 2), dim=-1)),
    Case("sum", "two dimensions", lambda m: ttnn.sum(tiles(m, 1, 2, 32, 64), dim=[1, 2])),
    Case("sum", "all", lambda m: ttnn.sum(tiles(m, 1, 2, 32, 64))),
    Case("sum", "dimension out of range", lambda m: ttnn.sum(tiles(m, 1, 1, 32, 64), dim=4)),
    Case("sum", "ROW_MAJOR", lambda m: ttnn.sum(rows(m, 1, 1, 32, 64), dim=-1)),
    Case("sum", "uint32", lambda m: ttnn.sum(tiles(m, 1, 1, 32, 64, dtype=ttnn.uint32), dim=-1)),
    Case("topk", "experts", lambda m: ttnn.topk(tiles(m, 1, 1, 32, 64), 8, dim=-1)),
    Case("topk", "experts of a group", lambda m: ttnn.topk(tiles(m, 1, 32, 8, 32), 2, dim=-1)),
    Case("topk", "of eight groups", lambda m: ttnn.topk(tiles(m, 1, 1, 32, 8), 4, dim=-1)),
    Case("topk", "float32", lambda m: ttnn.topk(tiles(m, 1, 1, 32, 64, dtype=ttnn.float32), 8, dim=-1)),
    Case("topk", "more than there are", lambda m: ttnn.topk(tiles(m, 1, 1, 32, 64), 65, dim=-1)),
    Case("topk", "ROW_MAJOR", lambda m: ttnn.topk(rows(m, 1, 1, 32, 64), 8, dim=-1)),
    Case("topk", "dimension out of range", lambda m: ttnn.topk(tiles(m, 1, 1, 32, 64), 8, dim=4)),
    Case("topk", "uint32", lambda m: ttnn.topk(tiles(m, 1, 1, 32, 64, dtype=ttnn.uint32), 8, dim=-1)),
    Case("argmax", "ROW_MAJOR", lambda m: ttnn.argmax(rows(m, 1, 1, 32, 64), dim=-1)),
    Case("argmax", "keeping the dimension", lambda m: ttnn.argmax(rows(m, 1, 1, 32, 64), dim=-1, keepdim=True)),
    Case("argmax", "TILE", lambda m: ttnn.argmax(tiles(m, 1, 1, 32, 64), dim=-1)),
    Case("argmax", "dimension out of range", lambda m: ttnn.argmax(rows(m, 1, 1, 32, 64), dim=4)),
    Case("softmax", "the last dimension", lambda m: ttnn.softmax(tiles(m, 1, 1, 32, 64), dim=-1)),
    Case("softmax", "tokens", lambda m: ttnn.softmax(tiles(m, 1, 1, 32, 64), dim=2)),
    Case("softmax", "dimension out of range", lambda m: ttnn.softmax(tiles(m, 1, 1, 32, 64), dim=4)),
    Case("softmax", "uint32", lambda m: ttnn.softmax(tiles(m, 1, 1, 32, 64, dtype=ttnn.uint32), dim=-1)),
    Case(
        "experimental.fast_reduce_nc",
        "experts",
        lambda m: ttnn.experimental.fast_reduce_nc(
            tiles(m, 1, 4, 32, 64), dims=[1], memory_config=ttnn.L1_MEMORY_CONFIG
        ),
    ),
    Case(
        "experimental.fast_reduce_nc",
        "both",
        lambda m: ttnn.experimental.fast_reduce_nc(tiles(m, 2, 4, 32, 64), dims=[0, 1]),
    ),
    Case(
        "experimental.fast_reduce_nc",
        "tokens",
        lambda m: ttnn.experimental.fast_reduce_nc(tiles(m, 1, 4, 32, 64), dims=[2]),
    ),
    Case(
        "experimental.fast_reduce_nc",
        "nothing",
        lambda m: ttnn.experimental.fast_reduce_nc(tiles(m, 1, 4, 32, 64), dims=[]),
    ),
    Case(
        "experimental.fast_reduce_nc",
        "uint32",
        lambda m: ttnn.experimental.fast_reduce_nc(tiles(m, 1, 4, 32, 64, dtype=ttnn.uint32), dims=[1]),
    ),
    Case(
        "experimental.fast_reduce_nc",
        "ROW_MAJOR",
        lambda m: ttnn.experimental.fast_reduce_nc(rows(m, 1, 4, 32, 64), dims=[1]),
    ),
    Case(
        "experimental.deepseek_grouped_gate",
        "DeepSeek-V3",
        lambda m: gate(tiles(m, 1, 1, 32, 256), tiles(m, 1, 1, 32, 256)),
    ),
    Case(
        "experimental.deepseek_grouped_gate",
        "five tokens",
        lambda m: gate(tiles(m, 1, 1, 5, 256), tiles(m, 1, 1, 5, 256)),
    ),
    Case(
        "experimental.deepseek_grouped_gate",
        "one bias for all tokens",
        lambda m: gate(tiles(m, 1, 1, 32, 256), tiles(m, 1, 1, 1, 256)),
    ),
    Case(
        "experimental.deepseek_grouped_gate",
        "128 experts",
        lambda m: gate(tiles(m, 1, 1, 32, 128), tiles(m, 1, 1, 32, 128)),
    ),
    Case(
        "experimental.deepseek_grouped_gate",
        "float32 logits",
        lambda m: gate(tiles(m, 1, 1, 32, 256, dtype=ttnn.float32), tiles(m, 1, 1, 32, 256, dtype=ttnn.float32)),
    ),
    Case(
        "experimental.deepseek_grouped_gate",
        "ROW_MAJOR",
        lambda m: gate(rows(m, 1, 1, 32, 256), rows(m, 1, 1, 32, 256)),
    ),
    Case(
        "experimental.deepseek_grouped_gate",
        "more groups chosen than there are",
        lambda m: gate(tiles(m, 1, 1, 32, 256), tiles(m, 1, 1, 32, 256), topk_groups=9),
    ),
    Case(
        "experimental.deepseek_grouped_gate",
        "three groups chosen",
        lambda m: gate(tiles(m, 1, 1, 32, 256), tiles(m, 1, 1, 32, 256), topk_groups=3),
    ),
    Case(
        "experimental.deepseek_grouped_gate",
        "six experts chosen",
        lambda m: gate(tiles(m, 1, 1, 32, 256), tiles(m, 1, 1, 32, 256), n_activated_experts=6),
    ),
    Case(
        "experimental.deepseek_grouped_gate",
        "seven groups",
        lambda m: gate(tiles(m, 1, 1, 32, 256), tiles(m, 1, 1, 32, 256), n_groups=7),
    ),
    Case(
        "experimental.deepseek_grouped_gate",
        "groups rated by their best",
        lambda m: gate(tiles(m, 1, 1, 32, 256), tiles(m, 1, 1, 32, 256), summed_experts_per_group=1),
    ),
]
