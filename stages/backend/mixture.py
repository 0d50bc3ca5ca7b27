"""A mixture of experts on chips: all experts of a chip are one feed-forward network, whose inner values are weighted.

A weight of 0 leaves an expert out. Shared experts are the network's last part, with a weight of 1 for the tokens of the
chip's own row, so that the sum over all chips has them once.
"""

from typing import NamedTuple

import torch

from stages.backend import composite, ttnn
from stages.tensor_dtypes import TILE

KEPT_TOKENS = 512
"""Tokens up to which the constants of a step are kept for the next: as many as decode steps have."""


class StepConstants(NamedTuple):
    """What routing needs for a number of tokens: the bias for each, and weights before any expert is chosen.

    `blank` [1, 1, T, experts + 32] is 0 but for the first column behind the experts: 1 for tokens of the chip's row.
    """

    bias: ttnn.Tensor
    blank: ttnn.Tensor

    @classmethod
    def of(cls, bias: ttnn.Tensor, tokens: int) -> "StepConstants":
        """Makes them for tokens of all rows, given a bias [1, 1, 1, experts]."""
        mesh_device, experts = bias.device(), bias.shape[3]
        rows, columns = tuple(mesh_device.shape)
        blank = torch.zeros(rows, rows, tokens // rows, experts + TILE)
        blank[torch.arange(rows), torch.arange(rows), :, experts] = 1
        return cls(
            ttnn.repeat(bias, (1, 1, tokens, 1)),
            ttnn.from_torch(
                blank.view(rows, 1, tokens, experts + TILE),
                dtype=ttnn.bfloat16,
                layout=ttnn.ROW_MAJOR_LAYOUT,
                device=mesh_device,
                mesh_mapper=ttnn.ShardTensor2dMesh(mesh_device, (rows, columns), (0, None)),
            ),
        )


def step_constants(kept: dict[int, StepConstants], bias: ttnn.Tensor, tokens: int) -> StepConstants:
    """The constants of a step, from `kept` where they are there; those of few tokens are added to it."""
    constants = kept.get(tokens)
    if constants is None:
        constants = StepConstants.of(bias, tokens)
        if tokens <= KEPT_TOKENS:
            kept[tokens] = constants
    return constants


def expert_selection(small: ttnn.Tensor, inner: int, shared: int) -> ttnn.Tensor:
    """Spreads columns over experts: [1, 1, experts + 32, own experts + 1] -> [.., own experts * `inner` + `shared`].

    The last column is that of the shared experts.
    """
    height, columns = small.shape[2], small.shape[3]
    apart = ttnn.reshape(small, (1, height, columns, 1))
    own = ttnn.slice(apart, [0, 0, 0, 0], [1, height, columns - 1, 1])
    last = ttnn.slice(apart, [0, 0, columns - 1, 0], [1, height, columns, 1])
    parts = [
        ttnn.reshape(ttnn.repeat(part, (1, 1, 1, width)), (1, 1, height, part.shape[2] * width))
        for part, width in ((own, inner), (last, shared))
    ]
    return ttnn.typecast(ttnn.concat(parts, dim=-1), ttnn.bfloat4_b)


def routing(
    logits: ttnn.Tensor,
    constants: StepConstants,
    bias: ttnn.Tensor,
    *,
    n_groups: int,
    topk_groups: int,
    n_activated_experts: int,
    route_scale: float,
    norm_topk_prob: bool,
) -> ttnn.Tensor:
    """Weights of all experts for `logits` [1, 1, T, experts]: [1, 1, T, experts + 32], 0 for those not chosen.

    The rule is that of `composite.moe_gate`. The first column behind the experts is the weight of shared ones.
    """
    if norm_topk_prob and (logits.shape[3], n_groups, topk_groups, n_activated_experts) == composite.FUSED_GATE:
        weights, indices = ttnn.experimental.deepseek_prefill.moe_grouped_topk(
            logits,
            constants.bias,
            n_groups=n_groups,
            summed_experts_per_group=2,
            topk_groups=topk_groups,
            n_activated_experts=n_activated_experts,
            route_scale=route_scale,
            epsilon=1e-20,
            weights_layout=ttnn.ROW_MAJOR_LAYOUT,
        )
    else:
        weights, indices = composite.chip_moe_gate(
            logits,
            bias,
            n_groups=n_groups,
            topk_groups=topk_groups,
            n_activated_experts=n_activated_experts,
            route_scale=route_scale,
            norm_topk_prob=norm_topk_prob,
        )
        weights = ttnn.to_layout(weights, ttnn.ROW_MAJOR_LAYOUT)
    # In rows, which is how chips scatter: of tiles each operand would be rewritten first.
    indices = ttnn.to_layout(indices, ttnn.ROW_MAJOR_LAYOUT)
    return ttnn.to_layout(ttnn.scatter(constants.blank, -1, indices, weights), ttnn.TILE_LAYOUT)


def stacked_experts(
    x: ttnn.Tensor,
    weights: ttnn.Tensor,
    *,
    select: ttnn.Tensor,
    w13: ttnn.Tensor,
    w2: ttnn.Tensor,
    memory_config: ttnn.MemoryConfig | None = None,
    compute_kernel_config: ttnn.WormholeComputeKernelConfig | None = None,
) -> ttnn.Tensor:
    """Runs each chip's experts: its part, [1, 1, T, H], of the weighted sum over all of them.

    Tokens `x` [1, 1, T, H] and `weights` [1, 1, T, experts + 32] are the same on all chips. w13 [1, 1, H, 2 * W] has
    pairs of tiles of columns, a gate's and one that goes up, and w2 is [1, 1, W, H].
    """
    hidden = ttnn.experimental.minimal_matmul(
        x, w13, fuse_swiglu=True, memory_config=memory_config, compute_kernel_config=compute_kernel_config
    )
    # Four passes: weights keep all their bits.
    exact = ttnn.WormholeComputeKernelConfig(math_fidelity=ttnn.MathFidelity.HiFi4, math_approx_mode=False)
    own = ttnn.matmul(weights, select, memory_config=memory_config, compute_kernel_config=exact)
    weighted = ttnn.mul(hidden, own, memory_config=memory_config)
    return ttnn.linear(weighted, w2, memory_config=memory_config, compute_kernel_config=compute_kernel_config)
