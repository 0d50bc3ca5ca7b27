"""The choice of experts, in torch: what DeepSeek-V3's gate computes."""

import torch

from stages.errors import DeviceError


def choose_experts(
    logits: torch.Tensor,
    bias: torch.Tensor,
    *,
    n_groups: int,
    topk_groups: int,
    n_activated_experts: int,
    route_scale: float,
    norm_topk_prob: bool,
    epsilon: float = 1e-20,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 weights and int64 indices, [..., n_activated_experts], of the experts chosen for logits [..., experts].

    Scores are sigmoid(logits). Experts are chosen by score + `bias`: first the `topk_groups` groups whose best two
    add up highest, then the best experts in them. Groups left out are masked with -inf, as in the gate of DeepSeek's
    inference code (inference/model.py of DeepSeek-V3); ports that mask with 0 let an expert that was left out win
    where the biased scores are negative. Weights are the scores without bias, divided by their sum + `epsilon` if
    `norm_topk_prob`, times `route_scale`.

    Raises DeviceError where the experts do not form the groups, or the groups chosen hold too few of them.
    """
    experts = logits.shape[-1]
    group, rest = divmod(experts, n_groups)
    if rest or not 1 <= topk_groups <= n_groups or not 1 <= n_activated_experts <= topk_groups * group:
        raise DeviceError(
            f"moe_gate cannot choose {n_activated_experts} of {experts} experts from {topk_groups} of {n_groups} "
            "groups."
        )
    scores = torch.sigmoid(logits.float())
    biased = scores + bias.float()
    if topk_groups < n_groups:
        grouped = biased.view(*biased.shape[:-1], n_groups, group)
        best = grouped.topk(min(2, group), dim=-1)[0].sum(dim=-1)
        chosen = best.topk(topk_groups, dim=-1, sorted=False)[1]
        left_out = torch.ones_like(best, dtype=torch.bool).scatter_(-1, chosen, False)
        biased = grouped.masked_fill(left_out[..., None], -torch.inf).flatten(-2)
    indices = biased.topk(n_activated_experts, dim=-1, sorted=False)[1]
    weights = scores.gather(-1, indices)
    if norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + epsilon)
    return weights * route_scale, indices
