"""ttnn.experimental.deepseek_prefill: rotation of a part of a vector, and routing in one op."""

import torch

from stages.backend.embedded.chips import on_chips, refuse, refuse_all_but_tiles
from stages.backend.embedded.data_movement import concat
from stages.backend.embedded.dtype import TILE_LAYOUT, Layout, bfloat16, float32, held_in, uint16
from stages.backend.embedded.experts import choose_experts
from stages.backend.embedded.memory import MemoryConfig
from stages.backend.embedded.program_configs import WormholeComputeKernelConfig
from stages.backend.embedded.rotation import rotary_embedding_llama
from stages.backend.embedded.tensor import Tensor

__all__ = ["moe_grouped_topk", "rotary_embedding_indexed"]

GROUPED_TOPK = (256, 8, 2, 4, 8)
"""The experts, groups, experts that rate a group, chosen groups and chosen experts that the fused gate accepts."""


def rotary_embedding_indexed(
    input: Tensor,
    cos: Tensor,
    sin: Tensor,
    trans_mat: Tensor,
    kv_actual_global: int,
    cluster_axis: int,
    *,
    concat_prefix: Tensor | None = None,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Rotates x [1, heads, T, d] as `rotary_embedding_llama` does and puts it behind `concat_prefix` [1, heads, T, p].

    Returns [1, heads, T, p + d]. Tables of cosines and sines are those of the step's own tokens, [1, 1, T, d]: on chips
    `kv_actual_global` says where in a longer table they begin. Raises DeviceError where it is not 0, for a prefix of
    other heads, tokens or dtype, and as `rotary_embedding_llama` does.
    """
    op = "rotary_embedding_indexed"
    if kv_actual_global:
        refuse(op, "the tables must begin with the step's own tokens", input, cos)
    if cluster_axis not in (0, 1):
        refuse(op, f"a mesh has axes 0 and 1, not {cluster_axis}", input)
    rotated = rotary_embedding_llama(input, cos, sin, trans_mat)
    if concat_prefix is None:
        return rotated
    if concat_prefix.shape[:3] != input.shape[:3] or concat_prefix.dtype is not input.dtype:
        refuse(op, "the prefix must have the heads, tokens and dtype of what is rotated", input, concat_prefix)
    return concat([concat_prefix, rotated], dim=-1)


def moe_grouped_topk(
    scores: Tensor,
    bias: Tensor,
    *,
    n_groups: int,
    summed_experts_per_group: int,
    topk_groups: int,
    n_activated_experts: int,
    route_scale: float = 1.0,
    epsilon: float = 1e-20,
    weights_layout: Layout = TILE_LAYOUT,
    memory_config: MemoryConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses experts for logits [1, 1, T, 256] with a bias of the same shape, in float32.

    Returns bfloat16 weights in `weights_layout` and uint16 indices in TILE layout, [1, 1, T, n_activated_experts].
    Raises DeviceError for other numbers than GROUPED_TOPK, a smaller bias, and operands other than floats of 16 or 32
    bits in TILE layout.
    """
    op = "moe_grouped_topk"
    numbers = (scores.shape[-1], n_groups, summed_experts_per_group, topk_groups, n_activated_experts)
    if numbers != GROUPED_TOPK or bias.shape != scores.shape:
        refuse(op, f"it takes the numbers {GROUPED_TOPK}, not {numbers}, and a bias of the logits' shape", scores, bias)
    refuse_all_but_tiles(op, scores, bias)
    if any(operand.dtype not in (bfloat16, float32) for operand in (scores, bias)):
        refuse(op, "logits and bias must be bfloat16 or float32", scores, bias)

    def choose(logits: torch.Tensor, correction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return choose_experts(
            logits,
            correction,
            n_groups=n_groups,
            topk_groups=topk_groups,
            n_activated_experts=n_activated_experts,
            route_scale=route_scale,
            norm_topk_prob=True,
            epsilon=epsilon,
        )

    chosen = on_chips(op, choose, scores, bias)
    weights = [pair[0].to(held_in(bfloat16)) for pair in chosen]
    indices = Tensor([pair[1] for pair in chosen], uint16, TILE_LAYOUT, scores.mesh)
    return Tensor(weights, bfloat16, weights_layout, scores.mesh), indices
