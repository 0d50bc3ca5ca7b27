"""Routing and routed experts on a CPU, where each expert runs only on the tokens that chose it."""

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual name

from stages.backend.embedded.chips import on_chips, refuse, refuse_because
from stages.backend.embedded.dtype import TILE_LAYOUT, uint16, uint32
from stages.backend.embedded.memory import MemoryConfig
from stages.backend.embedded.products import PACKED_FROM, Matrix
from stages.backend.embedded.program_configs import WormholeComputeKernelConfig
from stages.backend.embedded.tensor import Tensor
from stages.backend.embedded.trace import atomic
from stages.errors import DeviceError

FEW_CHOICES = 16
"""Choices of experts up to which each is computed on its own: sorting them would take longer than it saves."""


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
    """Chooses experts for logits [..., experts].

    Returns their float32 weights and int64 indices, [..., n_activated_experts]. Scores are sigmoid(logits). Experts are
    chosen by score + `bias`: first the `topk_groups` groups whose best two have the highest sum, then the best experts
    in them. Excluded groups are masked with -inf, as in the gate of DeepSeek's inference code (inference/model.py of
    DeepSeek-V3); ports that mask with 0 let an excluded expert win if the biased scores are negative. Weights are the
    scores without bias, divided by their sum + `epsilon` if `norm_topk_prob`, times `route_scale`.

    Raises DeviceError if the experts do not divide into the groups, or the chosen groups have too few of them.
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


def moe_gate(
    logits: Tensor,
    bias: Tensor,
    *,
    n_groups: int,
    topk_groups: int,
    n_activated_experts: int,
    route_scale: float,
    norm_topk_prob: bool,
) -> tuple[Tensor, Tensor]:
    """Chooses experts on each chip as `choose_experts` does.

    Returns weights in the logits' dtype and uint16 indices, [1, 1, T, n_activated_experts].
    """
    if bias.shape[-1] != logits.shape[-1]:
        refuse("moe_gate", "the bias must have one value for each expert", logits, bias)
    chosen = on_chips(
        "moe_gate",
        lambda own_logits, own_bias: choose_experts(
            own_logits,
            own_bias,
            n_groups=n_groups,
            topk_groups=topk_groups,
            n_activated_experts=n_activated_experts,
            route_scale=route_scale,
            norm_topk_prob=norm_topk_prob,
        ),
        logits,
        bias,
    )
    held = logits.shards[0].dtype
    weights = Tensor([pair[0].to(held) for pair in chosen], logits.dtype, TILE_LAYOUT, logits.mesh)
    return weights, Tensor([pair[1] for pair in chosen], uint16, TILE_LAYOUT, logits.mesh)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The choices of a batch sorted by expert.

    `choices` are indices into the flattened [T, k] choices, and `tokens` the token of each. Expert e has `counts[e]` of
    them.
    """

    choices: torch.Tensor
    tokens: torch.Tensor
    counts: list[int]


def routed_experts(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    *,
    select: Tensor | None = None,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Computes each chip's part of the weighted sum of experts, [1, 1, T, H]; see `stages.backend.composite`.

    `select` is for chips only. Raises DeviceError if the operands' shapes disagree, or an index is out of range.
    """
    _refuse_other_shapes(x, weights, indices, w1, w3, w2)
    local = w1.shape[1]
    gate_up = w1.remember("gate_up", lambda: [_gate_up(*shards) for shards in zip(w1.shards, w3.shards, strict=True)])
    down = w2.remember("down", lambda: [_split(shard) for shard in w2.shards])
    assignments: dict[int, Assignment] = {}
    shards = []
    try:
        if x.mesh.size == 1 and indices.shape.numel() <= FEW_CHOICES:
            few = _run_few(x.shards[0], weights.shards[0], indices.shards[0], gate_up[0], down[0])
            return Tensor([few], x.dtype, x.layout, x.mesh)
        for chip, chosen in enumerate(indices.shards):
            if id(chosen) not in assignments:
                assignments[id(chosen)] = _assign(chosen, local * x.mesh.size)
            own = assignments[id(chosen)]
            if len(own.counts) > local * x.mesh.size:
                refuse("routed_experts", f"an index is beyond the {local * x.mesh.size} experts", indices, w1)
            shards.append(_run(x.shards[chip], weights.shards[chip], own, chip * local, gate_up[chip], down[chip]))
    except (RuntimeError, IndexError) as error:
        refuse_because("routed_experts", error, x, indices, w1)
    return Tensor(shards, x.dtype, x.layout, x.mesh)


@atomic
def _assign(indices: torch.Tensor, experts: int) -> Assignment:
    flat = indices.reshape(-1)
    choices = torch.argsort(flat, stable=True)
    return Assignment(choices, choices // indices.shape[-1], torch.bincount(flat, minlength=experts).tolist())


def _split(shard: torch.Tensor) -> list[Matrix]:
    """The matrix [N, K] of each local expert."""
    return [Matrix(expert) for expert in shard[0].transpose(1, 2)]


class GateUp:
    """The two products that an expert begins with, x [rows, H] -> [rows, 2 * I]: gate, then up.

    Small matrices [I, H] are copied into one, as a call costs more than their rows; large ones stay where they are.
    """

    __slots__ = ("_matrices",)

    def __init__(self, gate: torch.Tensor, up: torch.Tensor) -> None:
        is_small = gate.numel() + up.numel() < PACKED_FROM
        self._matrices = [Matrix(torch.cat((gate, up)))] if is_small else [Matrix(gate), Matrix(up)]

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies x [rows, H] by both."""
        products = [matrix.times(x) for matrix in self._matrices]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def _gate_up(gate: torch.Tensor, up: torch.Tensor) -> list[GateUp]:
    return [GateUp(*expert) for expert in zip(gate[0].transpose(1, 2), up[0].transpose(1, 2), strict=True)]


@atomic
def _run_few(
    x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, gate_up: list[GateUp], down: list[Matrix]
) -> torch.Tensor:
    tokens, choices = indices.shape[-2:]
    chosen = indices.flatten().tolist()
    if not 0 <= min(chosen) <= max(chosen) < len(down):
        raise IndexError(f"an index is beyond the {len(down)} experts")
    rows = [row for row in x.view(tokens, 1, -1).unbind() for _ in range(choices)]
    gate, up = torch.cat([gate_up[e].times(row) for e, row in zip(chosen, rows, strict=True)]).chunk(2, dim=-1)
    hidden = F.silu(gate).mul_(up).unsqueeze(1).unbind()
    outputs = torch.cat([down[e].times(row) for e, row in zip(chosen, hidden, strict=True)])
    # As with many choices, each token's sum is in float32.
    total = torch.bmm(weights.view(tokens, 1, choices).float(), outputs.view(tokens, choices, -1).float())
    return total.to(x.dtype).view(x.shape)


@atomic
def _run(
    x: torch.Tensor,
    weights: torch.Tensor,
    assignment: Assignment,
    first_expert: int,
    gate_up: list[GateUp],
    down: list[Matrix],
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    counts = assignment.counts[first_expert : first_expert + len(down)]
    start = sum(assignment.counts[:first_expert])
    tokens = assignment.tokens[start : start + sum(counts)]
    factors = weights.reshape(-1).index_select(0, assignment.choices[start : start + sum(counts)]).float()
    # The sum is in float32 and in the order of the experts, so that it does not depend on the rest of the batch.
    total = torch.zeros(rows.shape, dtype=torch.float32)
    if len(tokens):
        hidden = _by_expert(gate_up, counts, rows.index_select(0, tokens))
        gate, up = hidden.chunk(2, dim=-1)
        outputs = _by_expert(down, counts, F.silu(gate).mul_(up))
        total.index_add_(0, tokens, outputs.float() * factors[:, None])
    return total.to(x.dtype).view(x.shape)


def _by_expert(matrices: Sequence[GateUp | Matrix], counts: list[int], rows: torch.Tensor) -> torch.Tensor:
    """Multiplies rows, sorted by expert, each by the matrix of its expert; expert e has `counts[e]` of them."""
    chosen = [(matrix, count) for matrix, count in zip(matrices, counts, strict=True) if count]
    parts = torch.split_with_sizes(rows, [count for _, count in chosen])
    return torch.cat([matrix.times(part) for (matrix, _), part in zip(chosen, parts, strict=True)])


def _refuse_other_shapes(x: Tensor, weights: Tensor, indices: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> None:
    op = "routed_experts"
    if any(operand.mesh is not x.mesh for operand in (weights, indices, w1, w3, w2)):
        refuse(op, "its operands are on different meshes, or one is on the host", x, weights, indices, w1, w3, w2)
    if indices.dtype not in (uint16, uint32) or indices.shape != weights.shape or indices.shape[:-1] != x.shape[:-1]:
        refuse(op, "weights and uint16 indices must be [1, 1, T, k] for x [1, 1, T, H]", x, weights, indices)
    hidden, inner = w1.shape[2:]
    if w3.shape != w1.shape or w2.shape != (1, w1.shape[1], inner, hidden) or x.shape[-1] != hidden:
        refuse(op, "w1 and w3 must be [1, experts, H, I] and w2 [1, experts, I, H] for x [1, 1, T, H]", x, w1, w3, w2)
