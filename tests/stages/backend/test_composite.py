"""The gate and the experts against plain Python, the chips' algorithms against the CPU's, and skipped collectives."""

from collections.abc import Callable

import pytest
import torch

from stages.backend import composite, set_float_dtype, ttnn
from stages.errors import DeviceError
from tests.support.embedded_meshes import on_chip, on_meshes, put, shards

pytestmark = pytest.mark.usefixtures("float32")


def choose(
    logits: list[float], bias: list[float], groups: int, kept: int, count: int, scale: float, norm: bool
) -> dict[int, float]:
    """The experts and weights of one token, written from the description in DeepSeek-V3's report (arXiv:2412.19437)."""
    scores = [1 / (1 + 2.718281828459045**-logit) for logit in logits]
    biased = [score + own for score, own in zip(scores, bias, strict=True)]
    size = len(logits) // groups
    members = [range(group * size, (group + 1) * size) for group in range(groups)]
    ranked = sorted(members, key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    candidates = [expert for group in ranked[:kept] for expert in group]
    chosen = sorted(candidates, key=lambda expert: -biased[expert])[:count]
    total = sum(scores[expert] for expert in chosen) + 1e-20 if norm else 1.0
    return {expert: scale * scores[expert] / total for expert in chosen}


def routes(chosen: tuple[ttnn.Tensor, ttnn.Tensor]) -> list[list[dict[int, float]]]:
    """The experts with their weights, for each chip and token."""
    weights, indices = chosen
    return [
        [dict(zip(i, w, strict=True)) for i, w in zip(own_i[0, 0].tolist(), own_w[0, 0].tolist(), strict=True)]
        for own_i, own_w in zip(shards(indices), shards(weights), strict=True)
    ]


ROUTES = [
    (16, 4, 2, 4, True),
    (16, 4, 4, 4, True),
    (16, 1, 1, 1, False),
    (16, 4, 1, 4, False),
    (24, 3, 2, 16, True),
    (256, 8, 4, 8, True),
    (8, 1, 1, 8, True),
]


@on_meshes
@pytest.mark.parametrize(("experts", "groups", "kept", "count", "norm"), ROUTES)
@pytest.mark.parametrize("spread", [0.2, 3.0], ids=["positive", "negative-biases"])
def test_gate(
    mesh: ttnn.MeshDevice, experts: int, groups: int, kept: int, count: int, norm: bool, spread: float
) -> None:
    logits, bias = torch.randn(1, 1, 9, experts), torch.randn(1, 1, 1, experts) * spread - 5 * (spread > 1)
    chosen = composite.moe_gate(
        put(mesh, logits, dtype=ttnn.float32),
        put(mesh, bias, dtype=ttnn.float32),
        n_groups=groups,
        topk_groups=kept,
        n_activated_experts=count,
        route_scale=2.5,
        norm_topk_prob=norm,
    )
    assert chosen[0].dtype is ttnn.float32
    for chip in routes(chosen):
        for token, found in enumerate(chip):
            expected = choose(logits[0, 0, token].tolist(), bias.flatten().tolist(), groups, kept, count, 2.5, norm)
            assert found == pytest.approx(expected, rel=1e-5)


@on_chip
def test_gate_computes_in_float32_whatever_floats_are_held_in(mesh: ttnn.MeshDevice) -> None:
    set_float_dtype(torch.bfloat16)
    # Around 1, bfloat16 values are 0.0078 apart: these differ by much less.
    logits = torch.tensor([1.0, 1.0001, 1.0002, 1.0003])[None, None, None]
    weights, indices = composite.moe_gate(
        put(mesh, logits, dtype=ttnn.float32),
        put(mesh, torch.zeros(1, 1, 1, 4), dtype=ttnn.float32),
        n_groups=1,
        topk_groups=1,
        n_activated_experts=2,
        route_scale=1.0,
        norm_topk_prob=True,
    )
    assert set(shards(indices)[0].flatten().tolist()) == {2, 3}
    assert shards(weights)[0].dtype == torch.float32


@on_meshes
@pytest.mark.parametrize(("experts", "groups", "kept", "count", "norm"), ROUTES)
def test_the_chips_gate_agrees(
    mesh: ttnn.MeshDevice, experts: int, groups: int, kept: int, count: int, norm: bool
) -> None:
    logits = put(mesh, torch.randn(1, 1, 9, experts), dtype=ttnn.float32)
    bias = put(mesh, torch.randn(1, 1, 1, experts) * 0.2, dtype=ttnn.float32)
    gates = [
        gate(
            logits,
            bias,
            n_groups=groups,
            topk_groups=kept,
            n_activated_experts=count,
            route_scale=2.5,
            norm_topk_prob=norm,
        )
        for gate in (composite.moe_gate, composite.chip_moe_gate)
    ]
    for mine, theirs in zip(*map(routes, gates), strict=True):
        for ours, chips in zip(mine, theirs, strict=True):
            assert ours == pytest.approx(chips, rel=1e-5)


@on_chip
@pytest.mark.parametrize(
    ("groups", "kept", "count", "biases"), [(3, 1, 1, 16), (4, 5, 1, 16), (4, 1, 5, 16), (4, 2, 4, 15)]
)
def test_gate_refuses_impossible_choices(
    mesh: ttnn.MeshDevice, groups: int, kept: int, count: int, biases: int
) -> None:
    with pytest.raises(DeviceError, match="moe_gate"):
        composite.moe_gate(
            put(mesh, torch.zeros(1, 1, 2, 16)),
            put(mesh, torch.zeros(1, 1, 1, biases)),
            n_groups=groups,
            topk_groups=kept,
            n_activated_experts=count,
            route_scale=1.0,
            norm_topk_prob=True,
        )


class Experts:
    """Sixteen random experts on a mesh, with tokens, weights and indices."""

    def __init__(self, mesh: ttnn.MeshDevice, tokens: int, hidden: int = 64, inner: int = 32, count: int = 3) -> None:
        by_chip = ttnn.ShardTensorToMesh(mesh, 1)
        self.w1, self.w3 = (torch.randn(1, 16, inner, hidden).mT * 0.2 for _ in range(2))
        self.w2 = torch.randn(1, 16, hidden, inner).mT * 0.2
        self.x = torch.randn(1, 1, tokens, hidden)
        self.weights = torch.rand(1, 1, tokens, count)
        # The last two experts are never chosen.
        self.indices = torch.stack([torch.randperm(14)[:count] for _ in range(tokens)])[None, None]
        self.matrices = [
            ttnn.from_torch(w, ttnn.bfloat8_b, layout=ttnn.TILE_LAYOUT, device=mesh, mesh_mapper=by_chip)
            for w in (self.w1, self.w3, self.w2)
        ]
        self.select = ttnn.from_torch(
            torch.eye(16)[None, None],
            ttnn.bfloat16,
            layout=ttnn.TILE_LAYOUT,
            device=mesh,
            mesh_mapper=ttnn.ShardTensorToMesh(mesh, 3),
        )
        self.operands = (
            put(mesh, self.x),
            put(mesh, self.weights, dtype=ttnn.float32),
            put(mesh, self.indices, dtype=ttnn.uint16),
        )

    def expected(self) -> torch.Tensor:
        output = torch.zeros_like(self.x)
        for token, row in enumerate(self.x[0, 0]):
            for weight, expert in zip(self.weights[0, 0, token], self.indices[0, 0, token].tolist(), strict=True):
                gate, up = row @ self.w1[0, expert], row @ self.w3[0, expert]
                output[0, 0, token] += weight * ((gate / (1 + torch.exp(-gate)) * up) @ self.w2[0, expert])
        return output

    def run(self, algorithm: Callable[..., ttnn.Tensor]) -> torch.Tensor:
        """The sum of all chips' parts."""
        return torch.stack(shards(algorithm(*self.operands, *self.matrices, select=self.select))).sum(0)


@on_meshes
@pytest.mark.parametrize("tokens", [1, 2, 40])
def test_experts_and_the_chips_experts(mesh: ttnn.MeshDevice, tokens: int) -> None:
    experts = Experts(mesh, tokens)
    expected = experts.expected()
    for _ in range(2):
        torch.testing.assert_close(experts.run(composite.routed_experts), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(experts.run(composite.chip_routed_experts), expected, rtol=1e-5, atol=1e-5)


@on_chip
def test_experts_large_enough_to_be_packed(mesh: ttnn.MeshDevice) -> None:
    experts = Experts(mesh, 5, hidden=512, inner=512)
    torch.testing.assert_close(experts.run(composite.routed_experts), experts.expected(), rtol=1e-4, atol=1e-3)


@on_chip
def test_the_chips_experts_take_many_tokens_in_parts(mesh: ttnn.MeshDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composite, "TOKENS_AT_ONCE", 16)
    experts = Experts(mesh, 40)
    torch.testing.assert_close(experts.run(composite.chip_routed_experts), experts.expected(), rtol=1e-5, atol=1e-5)


@on_chip
def test_a_tokens_experts_do_not_depend_on_the_other_tokens_order(mesh: ttnn.MeshDevice) -> None:
    experts = Experts(mesh, 12)
    together = experts.run(composite.routed_experts)
    order = torch.randperm(12)
    x, weights, indices = (tensor[:, :, order] for tensor in (experts.x, experts.weights, experts.indices))
    experts.operands = (put(mesh, x), put(mesh, weights, dtype=ttnn.float32), put(mesh, indices, dtype=ttnn.uint16))
    torch.testing.assert_close(experts.run(composite.routed_experts), together[:, :, order], rtol=1e-6, atol=1e-6)


@on_meshes
def test_experts_refuse(mesh: ttnn.MeshDevice) -> None:
    experts = Experts(mesh, 4)
    x, weights, indices = experts.operands
    w1, w3, w2 = experts.matrices
    wrong = [
        ((x, weights, put(mesh, experts.indices)), (w1, w3, w2), "uint16 indices"),
        ((x, weights, put(mesh, experts.indices[..., :2], dtype=ttnn.uint16)), (w1, w3, w2), "uint16 indices"),
        ((x, weights, put(mesh, experts.indices + 14, dtype=ttnn.uint16)), (w1, w3, w2), "beyond the 16 experts"),
        ((x, weights, put(mesh, experts.indices - 14, dtype=ttnn.uint16)), (w1, w3, w2), "routed_experts refuses"),
        ((x, weights, indices), (w1, w2, w3), "w1 and w3 must be"),
        ((put(mesh, experts.x[..., :32]), weights, indices), (w1, w3, w2), "w1 and w3 must be"),
    ]
    for operands, matrices, message in wrong:
        with pytest.raises(DeviceError, match=message):
            composite.routed_experts(*operands, *matrices, select=experts.select)
    elsewhere = Experts(ttnn.open_mesh_device(ttnn.MeshShape(*mesh.shape)), 4)
    with pytest.raises(DeviceError, match="different meshes"):
        composite.routed_experts(x, weights, indices, *elsewhere.matrices, select=experts.select)


COLLECTIVES: list[tuple[Callable[..., ttnn.Tensor], Callable[..., ttnn.Tensor]]] = [
    (
        lambda x, axis: composite.all_gather(x, 3, cluster_axis=axis),
        lambda x, axis: ttnn.all_gather(x, 3, cluster_axis=axis),
    ),
    (
        lambda x, axis: composite.reduce_scatter(x, 3, cluster_axis=axis),
        lambda x, axis: ttnn.reduce_scatter(x, 3, cluster_axis=axis),
    ),
    (lambda x, axis: composite.all_reduce(x, cluster_axis=axis), lambda x, axis: ttnn.all_reduce(x, cluster_axis=axis)),
    (
        lambda x, axis: composite.mesh_partition(x, 1, cluster_axis=axis),
        lambda x, axis: ttnn.mesh_partition(x, 1, axis),
    ),
    (
        lambda x, axis: composite.all_to_all(x, in_dim=2, out_dim=1, cluster_axis=axis),
        lambda x, axis: ttnn.experimental.all_to_all_async_generic(x, in_dim=2, out_dim=1, cluster_axis=axis),
    ),
]


@on_meshes
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("collective", "plain"), COLLECTIVES)
def test_collectives_vanish_on_an_axis_of_one_chip(
    mesh: ttnn.MeshDevice,
    axis: int,
    collective: Callable[..., ttnn.Tensor],
    plain: Callable[..., ttnn.Tensor],
) -> None:
    x = put(mesh, torch.randn(1, 8, 16, 8 * mesh.shape[0] * mesh.shape[1]), (3, None))
    if mesh.shape[axis] == 1:
        assert collective(x, axis) is x
    else:
        assert all(map(torch.equal, shards(collective(x, axis)), shards(plain(x, axis))))
