"""Ops that each device computes in its own way, under one signature, and collectives that skip an axis of one chip.

Chips and the CPU choose experts and run them by different algorithms. The chips' algorithms are written in ttnn, so
they run on the embedded device too, where tests compare them with the CPU's.
"""

from collections.abc import Sequence

from stages.backend import DEVICE, ttnn
from stages.backend.embedded import experts
from stages.tensor_dtypes import TILE
from stages.wormhole import HEADS_TOGETHER as HEADS_TOGETHER_ON_CHIPS
from stages.wormhole import TOKENS_AT_ONCE

FUSED_GATE = (256, 8, 4, 8)
"""DeepSeek-V3's experts, groups, chosen groups and chosen experts, for which chips have a fused gate."""

HEADS_TOGETHER = HEADS_TOGETHER_ON_CHIPS if DEVICE == "ttnn" else 1
"""The heads of a column come in multiples of this on the device of this process."""

LEFT_OUT = -1.0e4
"""What is added to the biased scores of excluded groups: far below any score, and finite in bfloat16."""


def is_on_chips() -> bool:
    """Whether the device of this process runs the chips' algorithms."""
    return DEVICE == "ttnn"


def all_gather(
    x: ttnn.Tensor, dim: int, *, cluster_axis: int, memory_config: ttnn.MemoryConfig | None = None
) -> ttnn.Tensor:
    """`ttnn.all_gather`; `x` itself on an axis of one chip."""
    if x.device().shape[cluster_axis] == 1:
        return x
    return ttnn.all_gather(x, dim, cluster_axis=cluster_axis, memory_config=memory_config)


def reduce_scatter(
    x: ttnn.Tensor, dim: int, *, cluster_axis: int, memory_config: ttnn.MemoryConfig | None = None
) -> ttnn.Tensor:
    """`ttnn.reduce_scatter`; `x` itself on an axis of one chip."""
    if x.device().shape[cluster_axis] == 1:
        return x
    return ttnn.reduce_scatter(x, dim, cluster_axis=cluster_axis, memory_config=memory_config)


def all_reduce(x: ttnn.Tensor, *, cluster_axis: int, memory_config: ttnn.MemoryConfig | None = None) -> ttnn.Tensor:
    """`ttnn.all_reduce`; `x` itself on an axis of one chip."""
    if x.device().shape[cluster_axis] == 1:
        return x
    return ttnn.all_reduce(x, cluster_axis=cluster_axis, memory_config=memory_config)


def all_to_all(
    x: ttnn.Tensor, *, in_dim: int, out_dim: int, cluster_axis: int, memory_config: ttnn.MemoryConfig | None = None
) -> ttnn.Tensor:
    """`ttnn.experimental.all_to_all_async_generic`; `x` itself on an axis of one chip.

    Heads for users: with in_dim=2, out_dim=1 on 8 chips [1, users, heads / 8, d] becomes [1, users / 8, heads, d].
    """
    if x.device().shape[cluster_axis] == 1:
        return x
    return ttnn.experimental.all_to_all_async_generic(
        x, in_dim=in_dim, out_dim=out_dim, cluster_axis=cluster_axis, memory_config=memory_config
    )


def mesh_partition(
    x: ttnn.Tensor, dim: int, *, cluster_axis: int, memory_config: ttnn.MemoryConfig | None = None
) -> ttnn.Tensor:
    """`ttnn.mesh_partition`; `x` itself on an axis of one chip."""
    if x.device().shape[cluster_axis] == 1:
        return x
    return ttnn.mesh_partition(x, dim, cluster_axis, memory_config=memory_config)


def split_heads(x: ttnn.Tensor, heads: int, split: int) -> tuple[ttnn.Tensor, ttnn.Tensor]:
    """Takes x [1, 1, T, heads * d] to heads [1, heads, T, d], cut before value `split` of each.

    `ttnn.experimental.nlp_create_q_heads_split`, or several ops where tiles would be cut.
    """
    width = x.shape[3] // heads
    if width % TILE == 0 and split % TILE == 0:
        first, second = ttnn.experimental.nlp_create_q_heads_split(x, num_heads=heads, split_head_dim=split)
        return first, second
    apart = ttnn.permute(ttnn.reshape(x, (1, x.shape[2], heads, width)), (0, 2, 1, 3))
    tokens = x.shape[2]
    return (
        ttnn.slice(apart, [0, 0, 0, 0], [1, heads, tokens, split]),
        ttnn.slice(apart, [0, 0, 0, split], [1, heads, tokens, width]),
    )


def zeroed(shape: Sequence[int], *, dtype: ttnn.DataType, device: ttnn.MeshDevice) -> ttnn.Tensor:
    """Creates tiles of zeros of `shape` on each chip, without memory of the host."""
    if DEVICE == "embedded":
        return ttnn.zeros(shape, dtype=dtype, layout=ttnn.TILE_LAYOUT, device=device)
    return chip_zeroed(shape, dtype=dtype, device=device)


def chip_zeroed(shape: Sequence[int], *, dtype: ttnn.DataType, device: ttnn.MeshDevice) -> ttnn.Tensor:
    """The implementation of `zeroed` on chips."""
    return _filled(shape, 0.0, dtype, device)


def _filled(shape: Sequence[int], value: float, dtype: ttnn.DataType, device: ttnn.MeshDevice) -> ttnn.Tensor:
    """Allocates a tensor and fills it on the chips: ttnn.full fills on the host, whose writes a trace cannot repeat."""
    tensor = ttnn.empty(shape, dtype=dtype, layout=ttnn.TILE_LAYOUT, device=device)
    return ttnn.fill(tensor, value, output_tensor=tensor)


def chip_moe_gate(
    logits: ttnn.Tensor,
    bias: ttnn.Tensor,
    *,
    n_groups: int,
    topk_groups: int,
    n_activated_experts: int,
    route_scale: float,
    norm_topk_prob: bool,
) -> tuple[ttnn.Tensor, ttnn.Tensor]:
    """The implementation of `moe_gate` on chips: the fused gate for the numbers FUSED_GATE, else composed of ops."""
    tokens, n_experts = logits.shape[2], logits.shape[3]
    logits = ttnn.typecast(logits, ttnn.bfloat16)
    bias = ttnn.typecast(bias, ttnn.bfloat16)
    if norm_topk_prob and (n_experts, n_groups, topk_groups, n_activated_experts) == FUSED_GATE:
        weights, indices = ttnn.experimental.deepseek_grouped_gate(
            logits,
            ttnn.repeat(bias, (1, 1, tokens, 1)),
            n_groups=n_groups,
            summed_experts_per_group=2,
            topk_groups=topk_groups,
            n_activated_experts=n_activated_experts,
            route_scale=route_scale,
            epsilon=1e-20,
        )
        return weights, indices
    scores = ttnn.sigmoid(logits)
    biased = ttnn.add(scores, bias)
    if topk_groups < n_groups:
        biased = ttnn.add(biased, _penalty(biased, n_groups, topk_groups))
    indices = ttnn.topk(biased, n_activated_experts, dim=-1)[1]
    weights = ttnn.gather(scores, -1, index=indices)
    if norm_topk_prob:
        weights = ttnn.div(weights, ttnn.add(ttnn.sum(weights, dim=-1, keepdim=True), 1e-20))
    return ttnn.mul(weights, route_scale), indices


def _penalty(biased: ttnn.Tensor, n_groups: int, topk_groups: int) -> ttnn.Tensor:
    """What to add to biased scores, [1, 1, T, experts]: 0 for experts of chosen groups, LEFT_OUT for the others."""
    tokens, n_experts = biased.shape[2], biased.shape[3]
    group = n_experts // n_groups
    grouped = ttnn.reshape(biased, (1, tokens, n_groups, group))
    best = ttnn.sum(ttnn.topk(grouped, 2, dim=-1)[0], dim=-1)
    chosen = ttnn.topk(ttnn.reshape(best, (1, 1, tokens, n_groups)), topk_groups, dim=-1)[1]
    penalty = ttnn.scatter(_constant(biased, n_groups, LEFT_OUT), -1, chosen, _constant(biased, topk_groups, 0.0))
    by_expert = ttnn.repeat(ttnn.reshape(penalty, (1, tokens, n_groups, 1)), (1, 1, 1, group))
    return ttnn.reshape(by_expert, (1, 1, tokens, n_experts))


def _constant(like: ttnn.Tensor, width: int, value: float) -> ttnn.Tensor:
    return _filled((1, 1, like.shape[2], width), value, ttnn.bfloat16, like.device())


def chip_routed_experts(
    x: ttnn.Tensor,
    weights: ttnn.Tensor,
    indices: ttnn.Tensor,
    w1: ttnn.Tensor,
    w3: ttnn.Tensor,
    w2: ttnn.Tensor,
    *,
    select: ttnn.Tensor,
    memory_config: ttnn.MemoryConfig | None = None,
    compute_kernel_config: ttnn.WormholeComputeKernelConfig | None = None,
) -> ttnn.Tensor:
    """The implementation of `routed_experts` on chips: all local experts on all tokens, with weight 0 if not chosen."""
    tokens = x.shape[2]
    weights = ttnn.typecast(weights, ttnn.bfloat16)
    parts = []
    for first in range(0, tokens, TOKENS_AT_ONCE):
        last = min(first + TOKENS_AT_ONCE, tokens)
        some, some_weights, some_indices = (_rows(tensor, first, last) for tensor in (x, weights, indices))
        dense = ttnn.scatter(_constant(some, select.shape[2], 0.0), -1, some_indices, some_weights)
        local = ttnn.matmul(dense, select)
        gate = ttnn.matmul(some, w1, memory_config=memory_config, compute_kernel_config=compute_kernel_config)
        up = ttnn.matmul(some, w3, memory_config=memory_config, compute_kernel_config=compute_kernel_config)
        hidden = ttnn.mul(gate, up, input_tensor_a_activations=[ttnn.UnaryOpType.SILU], memory_config=memory_config)
        output = ttnn.matmul(hidden, w2, memory_config=memory_config, compute_kernel_config=compute_kernel_config)
        weighted = ttnn.mul(output, ttnn.permute(local, (0, 3, 2, 1)), memory_config=memory_config)
        summed = ttnn.experimental.fast_reduce_nc(weighted, dims=[1], memory_config=memory_config)
        # The sum is padded to whole tiles.
        parts.append(_cut(summed, [0, 0, 0, 0], list(some.shape)))
    return parts[0] if len(parts) == 1 else ttnn.concat(parts, dim=2)


def _rows(tensor: ttnn.Tensor, first: int, last: int) -> ttnn.Tensor:
    """Tokens [first, last) of [1, 1, T, width]."""
    return _cut(tensor, [0, 0, first, 0], [1, 1, last, tensor.shape[3]])


def _cut(tensor: ttnn.Tensor, begins: list[int], ends: list[int]) -> ttnn.Tensor:
    """`ttnn.slice`, or the tensor itself if nothing is cut off."""
    if not any(begins) and ends == list(tensor.shape):
        return tensor
    return ttnn.slice(tensor, begins, ends)


def moe_gate(
    logits: ttnn.Tensor,
    bias: ttnn.Tensor,
    *,
    n_groups: int,
    topk_groups: int,
    n_activated_experts: int,
    route_scale: float,
    norm_topk_prob: bool,
) -> tuple[ttnn.Tensor, ttnn.Tensor]:
    """Chooses experts for `logits` [1, 1, T, experts]; returns weights and indices, [1, 1, T, n_activated_experts].

    `bias` [1, 1, 1, experts] affects the choice only. `stages.backend.embedded.experts` gives the rule and its source.
    For full precision keep logits and bias in float32; chips round them to bfloat16.
    """
    choose = experts.moe_gate if DEVICE == "embedded" else chip_moe_gate
    return choose(
        logits,
        bias,
        n_groups=n_groups,
        topk_groups=topk_groups,
        n_activated_experts=n_activated_experts,
        route_scale=route_scale,
        norm_topk_prob=norm_topk_prob,
    )


def routed_experts(
    x: ttnn.Tensor,
    weights: ttnn.Tensor,
    indices: ttnn.Tensor,
    w1: ttnn.Tensor,
    w3: ttnn.Tensor,
    w2: ttnn.Tensor,
    *,
    select: ttnn.Tensor,
    memory_config: ttnn.MemoryConfig | None = None,
    compute_kernel_config: ttnn.WormholeComputeKernelConfig | None = None,
) -> ttnn.Tensor:
    """Runs each chip's experts: its part, [1, 1, T, H], of the sum over a token's experts e of
    weight_e * w2_e(silu(w1_e(x)) * w3_e(x)).

    Tokens `x` [1, 1, T, H], `weights` and `indices` [1, 1, T, k] are the same on all chips. Experts are distributed
    over the chips in row-major order: each has w1, w3 [1, E / chips, H, I], w2 [1, E / chips, I, H] and `select` [1, 1,
    E, E / chips], the identity cut by columns (`ShardTensorToMesh(mesh, 3)`). Add the parts over both axes."""
    run = experts.routed_experts if DEVICE == "embedded" else chip_routed_experts
    return run(
        x,
        weights,
        indices,
        w1,
        w3,
        w2,
        select=select,
        memory_config=memory_config,
        compute_kernel_config=compute_kernel_config,
    )
