"""ttnn.transformer: attention on the paged latent cache of MLA, in which keys and values share one vector.

A cache is [blocks, 1, block_size, width]; a key is the whole vector of `width`, a value its first `head_dim_v`.
Scores and their softmax are in float32.
"""

import torch

from stages.backend.embedded.chips import refuse, refuse_all_but_float_tiles, refuse_because
from stages.backend.embedded.dtype import ROW_MAJOR_LAYOUT, TILE_SIZE, float32, int32
from stages.backend.embedded.memory import MemoryConfig
from stages.backend.embedded.paging import DecodePages, decode_pages, table_row
from stages.backend.embedded.products import widened
from stages.backend.embedded.program_configs import SDPAProgramConfig, WormholeComputeKernelConfig
from stages.backend.embedded.tensor import Tensor
from stages.backend.embedded.trace import atomic

__all__ = ["chunked_flash_mla_prefill", "paged_flash_multi_latent_attention_decode"]

QUERIES_AT_ONCE = 512
"""Query vectors, heads times tokens, of one product: with fewer the latents are read more often, with more the causal
mask discards more scores."""

SCORES_AT_ONCE = 1 << 22
"""The most attention scores that a prefill keeps at once: 16 MiB in float32, however long the context."""


def paged_flash_multi_latent_attention_decode(
    input_tensor_q: Tensor,
    input_tensor_k: Tensor,
    input_tensor_v: None = None,
    *,
    head_dim_v: int,
    page_table_tensor: Tensor,
    cur_pos_tensor: Tensor,
    scale: float | None = None,
    memory_config: MemoryConfig | None = None,
    program_config: SDPAProgramConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Attention of one query per user, [1, users, heads, width], over positions 0 to the user's own.

    Returns [1, users, heads, head_dim_v]. Positions [users] and page table [users, pages] are int32; a user at position
    -1 gets zeros. `scale` is width^-0.5 by default. Raises DeviceError if users, widths or the reach of the page table
    do not match."""
    op = "paged_flash_multi_latent_attention_decode"
    q, cache = input_tensor_q, input_tensor_k
    _refuse_other_operands(op, q, cache, head_dim_v)
    if q.shape[0] != 1 or q.shape[1] != cur_pos_tensor.shape[0]:
        refuse(op, "q must be [1, users, heads, width] with a position for each user", q, cur_pos_tensor)
    if q.mesh is not cache.mesh or q.mesh is not cur_pos_tensor.mesh:
        refuse(op, "its operands are on different meshes, or one is on the host", q, cache, cur_pos_tensor)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    pages = decode_pages(op, cur_pos_tensor, page_table_tensor, cache)
    done: dict[tuple[int, int, int], torch.Tensor] = {}
    shards = []
    for query, latents, own in zip(q.shards, cache.shards, pages, strict=True):
        key = (id(query), id(latents), id(own))
        if key not in done:
            try:
                done[key] = _attend_decode(query, latents, own, head_dim_v, factor)
            except (RuntimeError, IndexError) as error:
                refuse_because(op, error, q, cache)
        shards.append(done[key])
    return Tensor(shards, q.dtype, q.layout, q.mesh)


@atomic
def _attend_decode(
    q: torch.Tensor, cache: torch.Tensor, pages: DecodePages, head_dim_v: int, scale: float
) -> torch.Tensor:
    users, heads, width = q.shape[1:]
    blocks = cache.view(cache.shape[0], -1)
    output: torch.Tensor | None = None
    for bucket in pages.buckets:
        own = q[0] if bucket.users is None else q[0].index_select(0, bucket.users)
        queries = widened(own.reshape(-1, bucket.lanes * heads, width), bucket.lanes * heads)
        gathered = blocks.index_select(0, bucket.blocks).view(len(queries), -1, width)
        latents = widened(gathered[:, : bucket.longest], bucket.lanes * heads)
        attended = _attend(queries, latents, bucket.hidden, scale, head_dim_v).to(q.dtype).view(-1, heads, head_dim_v)
        if bucket.users is None:
            return attended[None]
        if output is None:
            output = q.new_zeros(users, heads, head_dim_v)
        output.index_copy_(0, bucket.users, attended)
    return q.new_zeros(1, users, heads, head_dim_v) if output is None else output[None]


def _attend(
    queries: torch.Tensor, latents: torch.Tensor, hidden: torch.Tensor | None, scale: float, head_dim_v: int
) -> torch.Tensor:
    """Attention of queries [requests, lanes * heads, width] over latents [requests, longest, width].

    `hidden` [requests * lanes, 1, longest] is true where a lane must not look.
    """
    scores = torch.bmm(queries, latents.transpose(1, 2)).float().mul_(scale)
    if hidden is not None:
        scores.view(len(hidden), -1, scores.shape[-1]).masked_fill_(hidden, -torch.inf)
    return torch.bmm(torch.softmax(scores, -1).to(queries.dtype), latents[..., :head_dim_v])


def chunked_flash_mla_prefill(
    input_tensor_q: Tensor,
    input_tensor_k: Tensor,
    head_dim_v: int,
    page_table_tensor: Tensor,
    chunk_start_idx: int,
    *,
    scale: float | None = None,
    memory_config: MemoryConfig | None = None,
    program_config: SDPAProgramConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Attention of queries [1, heads, T, width] at positions chunk_start_idx + t over the cache up to their positions.

    Returns [1, heads, T, head_dim_v]. The page table is int32 [1, pages]. `scale` is width^-0.5 by default. Raises
    DeviceError if widths or the reach of the page table do not match, or the start is not a multiple of 32.
    """
    op = "chunked_flash_mla_prefill"
    q, cache, table = input_tensor_q, input_tensor_k, page_table_tensor
    _refuse_other_operands(op, q, cache, head_dim_v)
    if chunk_start_idx < 0 or chunk_start_idx % TILE_SIZE:
        refuse(op, f"chunk start {chunk_start_idx} is not a multiple of {TILE_SIZE}", q, cache)
    if table.layout is not ROW_MAJOR_LAYOUT:
        refuse(op, "the page table must be in ROW_MAJOR layout", q, table)
    if table.dtype is not int32 or len(table.shape) != 2 or table.shape[0] != q.shape[0] or q.shape[0] != 1:
        refuse(op, "it takes q [1, heads, T, width] and an int32 page table [1, pages]", q, table)
    if q.mesh is not cache.mesh or q.mesh is not table.mesh:
        refuse(op, "its operands are on different meshes, or one is on the host", q, cache, table)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    done: dict[tuple[int, int, int], torch.Tensor] = {}
    shards = []
    for query, latents, pages in zip(q.shards, cache.shards, table.shards, strict=True):
        key = (id(query), id(latents), id(pages))
        if key not in done:
            blocks = table_row(op, pages, 0, chunk_start_idx + q.shape[2], cache.shape[2])
            try:
                done[key] = _attend_prefill(query[0], latents, blocks, chunk_start_idx, head_dim_v, factor)
            except (RuntimeError, IndexError) as error:
                refuse_because(op, error, q, cache, table)
        shards.append(done[key])
    return Tensor(shards, q.dtype, q.layout, q.mesh)


def _attend_prefill(
    q: torch.Tensor, cache: torch.Tensor, blocks: torch.Tensor, start: int, head_dim_v: int, scale: float
) -> torch.Tensor:
    heads, tokens, width = q.shape
    output = q.new_empty(1, heads, tokens, head_dim_v)
    rows = min(tokens, max(1, min(QUERIES_AT_ONCE, SCORES_AT_ONCE // (start + tokens)) // heads))
    latents = widened(cache.view(cache.shape[0], -1).index_select(0, blocks).view(-1, width), rows * heads)
    for first in range(0, tokens, rows):
        last = min(first + rows, tokens)
        seen = latents[: start + last]
        queries = q[:, first:last].reshape(-1, width).to(latents.dtype)
        scores = torch.mm(queries, seen.t()).float().mul_(scale).view(heads, last - first, -1)
        own = scores[..., start + first :]
        own.masked_fill_(torch.ones(own.shape[1:], dtype=torch.bool).triu_(1), -torch.inf)
        weights = torch.softmax(scores, -1).to(latents.dtype).view(len(queries), -1)
        output[0, :, first:last] = torch.mm(weights, seen[:, :head_dim_v]).view(heads, last - first, -1)
    return output


def _refuse_other_operands(op: str, q: Tensor, cache: Tensor, head_dim_v: int) -> None:
    refuse_all_but_float_tiles(op, q, cache)
    if q.dtype is float32 or cache.dtype is float32:
        refuse(op, "it takes no FLOAT32", q, cache)
    width = cache.shape[-1]
    if len(q.shape) != 4 or len(cache.shape) != 4 or cache.shape[1] != 1 or q.shape[-1] != width:
        refuse(op, "it takes q [..., width] and a cache [blocks, 1, block_size, width]", q, cache)
    if not 0 < head_dim_v <= width or head_dim_v % TILE_SIZE:
        refuse(op, f"head_dim_v {head_dim_v} is not a multiple of {TILE_SIZE} up to the cache's width", q, cache)
