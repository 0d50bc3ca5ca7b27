"""ttnn.experimental: writes to paged caches, routing and reductions, and what other files have of it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual name

from stages.backend.embedded import deepseek_prefill
from stages.backend.embedded.chips import on_chips, refuse, refuse_all_but_float_tiles, refuse_all_but_tiles, unary
from stages.backend.embedded.collectives import all_to_all_async_generic
from stages.backend.embedded.dtype import ROW_MAJOR_LAYOUT, TILE_LAYOUT, TILE_SIZE, bfloat16, float32, int32, uint16
from stages.backend.embedded.experts import choose_experts
from stages.backend.embedded.fused import (
    all_gather_minimal_matmul_async,
    minimal_matmul,
    nlp_concat_heads,
    nlp_create_q_heads_split,
)
from stages.backend.embedded.memory import MemoryConfig
from stages.backend.embedded.paging import DecodePages, decode_pages, table_row, write_in_place
from stages.backend.embedded.program_configs import WormholeComputeKernelConfig
from stages.backend.embedded.rotation import rotary_embedding_llama
from stages.backend.embedded.tensor import Tensor
from stages.backend.embedded.trace import atomic

__all__ = [
    "all_gather_minimal_matmul_async",
    "all_to_all_async_generic",
    "deepseek_grouped_gate",
    "deepseek_prefill",
    "fast_reduce_nc",
    "minimal_matmul",
    "nlp_concat_heads",
    "nlp_create_q_heads_split",
    "paged_fill_cache",
    "paged_update_cache",
    "rotary_embedding_llama",
]

GROUPED_GATE = (256, 8, 2, 4, 8)
"""The experts, groups, experts that rate a group, chosen groups and chosen experts that the fused gate accepts."""


def paged_update_cache(
    cache_tensor: Tensor,
    input_tensor: Tensor,
    *,
    update_idxs_tensor: Tensor,
    page_table: Tensor,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Writes one vector per user into the cache at the user's position; returns the cache.

    The input is [1, users, 1 (or a tile), width]. Positions [users] and page table [users, pages] are int32; position
    -1 skips the user. Raises DeviceError if users, widths or the reach of the page table do not match, the input has a
    block float dtype, or it is not sharded over cores (`to_memory_config`), one for each user."""
    op = "paged_update_cache"
    cache, x = cache_tensor, input_tensor
    shape = x.shape
    if len(shape) != 4 or shape[0] != 1 or shape[3] != cache.shape[-1] or shape[1] != update_idxs_tensor.shape[0]:
        refuse(op, "the input must be [1, users, 1, width] with a position for each user", cache, x, update_idxs_tensor)
    if x.dtype is not bfloat16 and x.dtype is not float32:
        refuse(op, f"the input must be bfloat16 or float32, not {x.dtype.name}", cache, x)
    refuse_all_but_tiles(op, cache, x)
    if x.shard_spec is None:
        refuse(op, "the input must be height-sharded, with a core for each user", cache, x)
    pages = decode_pages(op, update_idxs_tensor, page_table, cache)

    def write(chip: int, blocks: torch.Tensor, values: torch.Tensor, *_: torch.Tensor) -> None:
        _update_pages(blocks, values, pages[chip])

    write_in_place(op, write, cache, x, update_idxs_tensor, page_table)
    return cache


@atomic
def _update_pages(blocks: torch.Tensor, values: torch.Tensor, pages: DecodePages) -> None:
    vectors = values[0, :, 0]
    if pages.active is not None:
        vectors = vectors.index_select(0, pages.active)
    blocks.view(-1, blocks.shape[-1]).index_copy_(0, pages.rows, vectors.to(blocks.dtype))


def paged_fill_cache(
    cache_tensor: Tensor,
    input_tensor: Tensor,
    page_table: Tensor,
    *,
    batch_idx: int = 0,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Writes input [1, 1, T, width] into the blocks of row `batch_idx` of the page table; returns the cache.

    The page table is int32 [users, pages]; the first block of a row gets the first block_size tokens. Raises
    DeviceError if widths or the reach of the page table do not match, the input is not in the cache's dtype, or a
    layout is wrong."""
    op = "paged_fill_cache"
    cache, x = cache_tensor, input_tensor
    shape = x.shape
    if len(shape) != 4 or shape[:2] != (1, 1) or shape[3] != cache.shape[-1]:
        refuse(op, "the input must be [1, 1, T, width] with the cache's width", cache, x)
    if x.dtype is not cache.dtype or page_table.dtype is not int32:
        refuse(op, "the input must have the cache's dtype and the page table be int32", cache, x, page_table)
    if len(page_table.shape) != 2 or page_table.layout is not ROW_MAJOR_LAYOUT:
        refuse(op, "the page table must be [users, pages] in ROW_MAJOR layout", cache, x, page_table)
    refuse_all_but_tiles(op, cache, x)
    tokens, width, block_size = shape[2], shape[3], cache.shape[2]

    def write(_: int, blocks: torch.Tensor, values: torch.Tensor, table: torch.Tensor) -> None:
        own = table_row(op, table, batch_idx, tokens, block_size)
        whole = tokens // block_size
        vectors = values[0, 0]
        blocks.view(-1, block_size * width).index_copy_(
            0, own[:whole], vectors[: whole * block_size].reshape(whole, block_size * width)
        )
        if rest := tokens % block_size:
            blocks[own[whole], 0, :rest] = vectors[-rest:]

    write_in_place(op, write, cache, x, page_table)
    return cache


def deepseek_grouped_gate(
    scores: Tensor,
    bias: Tensor,
    *,
    n_groups: int,
    summed_experts_per_group: int,
    topk_groups: int,
    n_activated_experts: int,
    route_scale: float = 1.0,
    epsilon: float = 1e-20,
    memory_config: MemoryConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses experts for logits [1, 1, T, 256] with a bias of the same shape.

    Returns weights and uint16 indices [1, 1, T, n_activated_experts]. Raises DeviceError for other numbers than
    GROUPED_GATE, a smaller bias, or operands that are not bfloat16 in TILE layout.
    """
    op = "deepseek_grouped_gate"
    numbers = (scores.shape[-1], n_groups, summed_experts_per_group, topk_groups, n_activated_experts)
    if numbers != GROUPED_GATE or bias.shape != scores.shape:
        refuse(op, f"it takes the numbers {GROUPED_GATE}, not {numbers}, and a bias of the logits' shape", scores, bias)
    refuse_all_but_tiles(op, scores, bias)
    if scores.dtype is not bfloat16 or bias.dtype is not bfloat16:
        refuse(op, "logits and bias must be bfloat16", scores, bias)

    def choose(logits: torch.Tensor, correction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, indices = choose_experts(
            logits,
            correction,
            n_groups=n_groups,
            topk_groups=topk_groups,
            n_activated_experts=n_activated_experts,
            route_scale=route_scale,
            norm_topk_prob=True,
            epsilon=epsilon,
        )
        return weights.to(logits.dtype), indices

    chosen = on_chips(op, choose, scores, bias)
    weights = Tensor([pair[0] for pair in chosen], scores.dtype, TILE_LAYOUT, scores.mesh)
    return weights, Tensor([pair[1] for pair in chosen], uint16, TILE_LAYOUT, scores.mesh)


def fast_reduce_nc(
    input_tensor: Tensor,
    *,
    dims: Sequence[int],
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Sums over `dims`, which may contain 0 and 1 only, and keeps them with size 1.

    The last two dimensions of the result are padded to whole tiles, as on chips; here the padding is zero. Raises
    DeviceError for other dimensions, integers and ROW_MAJOR layout.
    """
    if not dims or any(dim not in (0, 1) for dim in dims):
        refuse("fast_reduce_nc", f"it sums over dimensions 0 and 1, not {list(dims)}", input_tensor)
    refuse_all_but_float_tiles("fast_reduce_nc", input_tensor)
    height, width = input_tensor.shape[-2:]
    padding = (0, -width % TILE_SIZE, 0, -height % TILE_SIZE)
    return unary("fast_reduce_nc", lambda a: F.pad(a.sum(tuple(dims), keepdim=True), padding), input_tensor)
