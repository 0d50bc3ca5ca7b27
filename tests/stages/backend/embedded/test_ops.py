"""The values of ops of one chip against plain torch, on meshes of several shapes."""

from collections.abc import Callable

import pytest
import torch

from stages.backend import set_float_dtype, ttnn
from stages.errors import DeviceError
from tests.support.embedded_meshes import assert_everywhere, integers, on_chip, on_meshes, put, shards

pytestmark = pytest.mark.usefixtures("float32")

SILU = [ttnn.UnaryOpType.SILU]


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


@on_meshes
@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (ttnn.silu, silu),
        (ttnn.sigmoid, lambda x: 1 / (1 + torch.exp(-x))),
        (lambda x: ttnn.add(x, 2.5), lambda x: x + 2.5),
        (lambda x: ttnn.mul(x, 2.5), lambda x: 2.5 * x),
        (lambda x: ttnn.subtract(x, 2.5), lambda x: x - 2.5),
        (lambda x: ttnn.div(x, 2.5), lambda x: x / 2.5),
        (lambda x: ttnn.reshape(x, (1, 4, -1, 8)), lambda x: x.reshape(1, 4, 3, 8)),
        (lambda x: ttnn.permute(x, (0, 2, 1, 3)), lambda x: x.transpose(1, 2)),
        (lambda x: ttnn.transpose(x, -2, -1), lambda x: x.mT),
        (lambda x: ttnn.slice(x, [0, 0, 2, 0], [1, 2, 5, 8]), lambda x: x[:, :, 2:5]),
        (lambda x: ttnn.slice(x, [0, 1, 2, 3], [1, 2, 5, 4]), lambda x: x[:, 1:2, 2:5, 3:4]),
        (lambda x: ttnn.concat([x, x], dim=-1), lambda x: torch.cat([x, x], 3)),
        (lambda x: ttnn.split(x, 3, dim=2)[1], lambda x: x[:, :, 3:]),
        (lambda x: ttnn.split(x, [2, 4], dim=2)[1], lambda x: x[:, :, 2:]),
        (lambda x: ttnn.repeat(x, (1, 2, 3, 1)), lambda x: torch.cat([torch.cat([x] * 3, 2)] * 2, 1)),
        (
            lambda x: ttnn.pad(x, [(0, 0), (0, 0), (1, 2), (0, 3)], 7.0),
            lambda x: torch.nn.functional.pad(x, (0, 3, 1, 2), value=7.0),
        ),
        (lambda x: ttnn.to_layout(x, ttnn.ROW_MAJOR_LAYOUT), lambda x: x),
        (lambda x: ttnn.to_memory_config(x, ttnn.L1_MEMORY_CONFIG), lambda x: x),
        (lambda x: ttnn.sum(x, dim=-1, keepdim=True), lambda x: torch.einsum("abcd->abc", x)[..., None]),
        (lambda x: ttnn.sum(x, dim=[1, 2]), lambda x: torch.einsum("abcd->ad", x)),
        (
            lambda x: ttnn.experimental.fast_reduce_nc(x, dims=[1]),
            lambda x: torch.nn.functional.pad(x[:, :1] + x[:, 1:], (0, 24, 0, 26)),
        ),
        (lambda x: ttnn.softmax(x, dim=2), lambda x: x.exp() / x.exp().sum(2, keepdim=True)),
        (lambda x: ttnn.argmax(x, dim=-1), lambda x: x.max(-1).indices),
        (lambda x: ttnn.topk(x, 3, dim=-1)[0], lambda x: x.sort(-1, descending=True).values[..., :3]),
        (lambda x: ttnn.topk(x, 3, dim=-1)[1], lambda x: x.sort(-1, descending=True).indices[..., :3]),
    ],
)
def test_one_operand(
    mesh: ttnn.MeshDevice,
    op: Callable[[ttnn.Tensor], ttnn.Tensor],
    expected: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    x = torch.randn(1, 2, 6, 8)
    assert_everywhere(op(put(mesh, x)), expected(x))
    columns = mesh.shape[1]
    whole = torch.randn(1, 2, 6, 8 * columns)
    for chip_number, shard in enumerate(shards(op(put(mesh, whole, (None, 3))))):
        torch.testing.assert_close(shard, expected(whole.chunk(columns, 3)[chip_number % columns]), check_dtype=False)


@on_meshes
@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (ttnn.add, lambda a, b: a + b),
        (ttnn.subtract, lambda a, b: a - b),
        (ttnn.mul, lambda a, b: a * b),
        (ttnn.div, lambda a, b: a / b),
        (lambda a, b: ttnn.mul(a, b, input_tensor_a_activations=SILU), lambda a, b: silu(a) * b),
        (lambda a, b: ttnn.concat([a, b], dim=2), lambda a, b: torch.cat([a, b], 2)),
    ],
)
def test_two_operands_cut_along_different_axes(
    mesh: ttnn.MeshDevice,
    op: Callable[[ttnn.Tensor, ttnn.Tensor], ttnn.Tensor],
    expected: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> None:
    rows, columns = mesh.shape
    a, b = torch.randn(rows, 1, 4, 8), torch.randn(1, columns, 4, 8)
    for number, shard in enumerate(shards(op(put(mesh, a, (0, None)), put(mesh, b, (None, 1))))):
        row, column = divmod(number, columns)
        torch.testing.assert_close(shard, expected(a[row : row + 1], b[:, column : column + 1]))


@on_meshes
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (512, 768)], ids=["plain", "packed"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_linear(
    mesh: ttnn.MeshDevice,
    inputs: int,
    outputs: int,
    transposed: bool,
    tokens: int,
) -> None:
    columns = mesh.shape[1]
    x, w = torch.randn(1, 1, tokens, inputs), torch.randn(1, 1, inputs, outputs * columns)
    weight = put(mesh, w.mT.contiguous().mT if transposed else w, (None, 3))
    expected = torch.einsum("tk,kn->tn", x[0, 0].double(), w[0, 0].double()).float()[None, None]
    for op in (ttnn.linear, ttnn.matmul, ttnn.linear):
        product = op(put(mesh, x), weight, memory_config=ttnn.L1_MEMORY_CONFIG)
        for number, shard in enumerate(shards(product)):
            part = expected.chunk(columns, 3)[number % columns]
            torch.testing.assert_close(shard, part, rtol=1e-5, atol=1e-4)
    activated = ttnn.linear(put(mesh, x), weight, activation="silu")
    torch.testing.assert_close(shards(activated)[0], silu(expected.chunk(columns, 3)[0]), rtol=1e-4, atol=1e-4)


@on_meshes
@pytest.mark.parametrize("transposed", [False, True])
def test_linear_with_a_matrix_for_each_head(mesh: ttnn.MeshDevice, transposed: bool) -> None:
    columns = mesh.shape[1]
    x, w = torch.randn(1, 2 * columns, 5, 32), torch.randn(1, 2 * columns, 32, 16)
    weight = put(mesh, w.mT.contiguous().mT if transposed else w, (None, 1))
    expected = torch.einsum("htk,hkn->htn", x[0], w[0])
    for number, shard in enumerate(shards(ttnn.linear(put(mesh, x, (None, 1)), weight))):
        head = 2 * (number % columns)
        torch.testing.assert_close(shard[0], expected[head : head + 2], rtol=1e-5, atol=1e-5)
    one_input = shards(ttnn.matmul(put(mesh, x[:, :1]), weight))[0]
    torch.testing.assert_close(one_input[0], torch.einsum("tk,hkn->htn", x[0, 0], w[0, :2]), rtol=1e-5, atol=1e-5)


@on_chip
@pytest.mark.parametrize("size", [64, 512], ids=["plain", "packed"])
@pytest.mark.parametrize("rows", [3, 200], ids=["few rows", "many rows"])
def test_linear_in_bfloat16_rounds_once_and_float32_weights_keep_float32(
    mesh: ttnn.MeshDevice, size: int, rows: int
) -> None:
    set_float_dtype(torch.bfloat16)
    x, w = torch.randn(1, 1, rows, size).bfloat16(), torch.randn(1, 1, size, size).bfloat16()
    exact = x.double() @ w.double()
    narrow = ttnn.linear(put(mesh, x), put(mesh, w, dtype=ttnn.bfloat8_b))
    assert narrow.dtype is ttnn.bfloat16
    torch.testing.assert_close(ttnn.to_torch(narrow).double(), exact, rtol=2**-8, atol=0.05)
    wide = ttnn.linear(put(mesh, x), put(mesh, w, dtype=ttnn.float32), dtype=ttnn.float32)
    assert ttnn.to_torch(wide).dtype == torch.float32
    torch.testing.assert_close(ttnn.to_torch(wide).double(), exact, rtol=1e-5, atol=1e-4)


@on_meshes
def test_embedding(mesh: ttnn.MeshDevice) -> None:
    table, ids = torch.randn(50, 8), torch.randint(0, 50, (2, 7))
    expected = torch.stack([torch.stack([table[i] for i in row]) for row in ids.tolist()])
    for weight in (table, table[None, None]):
        rows = ttnn.embedding(integers(mesh, ids, ttnn.uint32), put(mesh, weight), layout=ttnn.TILE_LAYOUT)
        assert_everywhere(rows, expected)
        assert rows.layout is ttnn.TILE_LAYOUT
    assert_everywhere(
        ttnn.embedding(integers(mesh, ids[:, None, None], ttnn.uint32), put(mesh, table), dtype=ttnn.float32), expected
    )


@on_meshes
def test_gather_and_scatter(mesh: ttnn.MeshDevice) -> None:
    x, values = torch.randn(1, 1, 5, 16), torch.randn(1, 1, 5, 3)
    index = torch.stack([torch.randperm(16)[:3] for _ in range(5)])[None, None]
    picked, written = torch.empty(1, 1, 5, 3), x.clone()
    for t in range(5):
        for j in range(3):
            picked[0, 0, t, j] = x[0, 0, t, index[0, 0, t, j]]
            written[0, 0, t, index[0, 0, t, j]] = values[0, 0, t, j]
    where = put(mesh, index, dtype=ttnn.uint16)
    source = put(mesh, x)
    assert_everywhere(ttnn.gather(source, -1, index=where), picked)
    assert_everywhere(ttnn.scatter(source, -1, where, put(mesh, values)), written)
    assert_everywhere(source, x)


@on_meshes
@pytest.mark.parametrize(
    ("gamma_shape", "layout"),
    [((1, 1, 1, -1), ttnn.TILE_LAYOUT), ((-1,), ttnn.TILE_LAYOUT), ((1, 1, -1, 32), ttnn.ROW_MAJOR_LAYOUT)],
)
def test_rms_norm(mesh: ttnn.MeshDevice, gamma_shape: tuple[int, ...], layout: ttnn.Layout) -> None:
    x, gamma = torch.randn(1, 2, 5, 96) * 3, torch.randn(96)
    expected = gamma * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    weight = put(mesh, gamma.view(gamma_shape), layout=layout)
    assert_everywhere(ttnn.rms_norm(put(mesh, x), weight=weight, epsilon=1e-3), expected)


def test_rms_norm_in_two_halves_around_a_gather() -> None:
    device = ttnn.open_mesh_device(ttnn.MeshShape(2, 4))
    x, gamma = torch.randn(1, 1, 6, 4 * 64) * 3, torch.randn(1, 1, 1, 4 * 64)
    own = put(device, x, (2, 3))
    statistics = ttnn.rms_norm_pre_all_gather(own)
    torch.testing.assert_close(shards(statistics)[5][0, 0, :, 0], x[0, 0, 3:, 64:128].square().sum(-1))
    gathered = ttnn.all_gather(statistics, 3, cluster_axis=1)
    weight = put(device, gamma, (None, 3))
    normed = ttnn.rms_norm_post_all_gather(own, gathered, weight=weight, epsilon=1e-3)
    joined = ttnn.to_torch(normed, mesh_composer=ttnn.ConcatMesh2dToTensor(device, (2, 4), (2, 3)))
    torch.testing.assert_close(joined, gamma * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt())
    with pytest.raises(DeviceError, match="the statistics must be 32 wide for each chip"):
        ttnn.rms_norm_post_all_gather(own, statistics, weight=weight)
    with pytest.raises(DeviceError, match="rms_norm_post_all_gather refuses"):
        ttnn.rms_norm_post_all_gather(own, gathered, weight=put(device, gamma[..., :64], (None, 3)))


@on_meshes
def test_rotary_embedding_turns_neighbours(mesh: ttnn.MeshDevice) -> None:
    x, angle = torch.randn(1, 4, 6, 16), torch.randn(6, 8)
    turned = torch.view_as_complex(x.view(1, 4, 6, 8, 2)) * torch.polar(torch.ones_like(angle), angle)
    wide = angle.repeat_interleave(2, -1)[None, None]
    cos, sin = put(mesh, wide.cos()), put(mesh, wide.sin())
    transformation = put(mesh, torch.zeros(1, 1, 32, 32))
    # This is the second half of a wider tensor, as the modules slice it: neither contiguous nor at its start.
    sliced = ttnn.slice(put(mesh, torch.cat([torch.zeros_like(x), x], -1)), [0, 0, 0, 16], [1, 4, 6, 32])
    for _ in range(2):
        rotated = ttnn.experimental.rotary_embedding_llama(sliced, cos, sin, transformation, is_decode_mode=False)
        assert_everywhere(rotated, torch.view_as_real(turned).flatten(-2))
    with pytest.raises(DeviceError, match="cos and sin must be"):
        ttnn.experimental.rotary_embedding_llama(
            ttnn.slice(sliced, [0, 0, 0, 0], [1, 4, 5, 16]), cos, sin, transformation
        )


@on_chip
def test_rotary_embedding_keeps_cosines_of_a_pair_apart(mesh: ttnn.MeshDevice) -> None:
    x, cos, sin = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    turned = torch.stack([-x[..., 1], x[..., 0], -x[..., 3], x[..., 2]], -1)
    rotated = ttnn.experimental.rotary_embedding_llama(
        put(mesh, x), put(mesh, cos), put(mesh, sin), put(mesh, torch.zeros(1, 1, 32, 32))
    )
    assert_everywhere(rotated, x * cos + turned * sin)


@on_chip
def test_typecast_to_integers_rounds_cuts_off_and_stays_in_range(mesh: ttnn.MeshDevice) -> None:
    values = put(mesh, torch.tensor([[-2.75, 1.25, 1.5, 70000.0]]))
    for dtype, expected in (
        (ttnn.uint16, [0, 1, 2, 65535]),
        (ttnn.uint32, [0, 1, 1, 70000]),
        (ttnn.int32, [-2, 1, 1, 70000]),
        (ttnn.uint8, [254, 1, 1, 70000 % 256]),
    ):
        assert ttnn.to_torch(ttnn.typecast(values, dtype)).tolist() == [expected]
    narrowed = ttnn.typecast(integers(mesh, torch.tensor([[3, 70000]]), ttnn.uint32), ttnn.uint16)
    assert ttnn.to_torch(narrowed).tolist() == [[3, 65535]]


@on_chip
def test_dtypes_of_chosen_indices(mesh: ttnn.MeshDevice) -> None:
    x = torch.randn(1, 1, 2, 8)
    assert ttnn.topk(put(mesh, x), 2)[1].dtype is ttnn.uint16
    assert ttnn.topk(put(mesh, x, dtype=ttnn.float32), 2)[1].dtype is ttnn.uint32
    assert ttnn.argmax(put(mesh, x), dim=-1).dtype is ttnn.uint32


@on_meshes
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: ttnn.linear(put(m, torch.zeros(1, 1, 2, 8)), put(m, torch.zeros(1, 1, 9, 4))), r"linear refuses"),
        (lambda m: ttnn.matmul(put(m, torch.zeros(1, 1, 2, 8)), put(m, torch.zeros(1, 3, 9, 4))), r"matmul refuses"),
        (
            lambda m: ttnn.linear(put(m, torch.zeros(1, 1, 2, 512)), put(m, torch.zeros(1, 1, 768, 512))),
            r"linear refuses \[1, 1, 2, 512\] and \[1, 1, 768, 512\]",
        ),
        (lambda m: ttnn.linear(put(m, torch.zeros(1, 1, 2, 8)), integers(m, torch.zeros(1, 1, 8, 4))), "TILE layout"),
        (
            lambda m: ttnn.linear(put(m, torch.zeros(1, 1, 2, 8)), put(m, torch.zeros(1, 1, 8, 4)), activation="relu"),
            "'relu' is unknown",
        ),
        (lambda m: ttnn.add(put(m, torch.zeros(1, 1, 2, 8)), put(m, torch.zeros(1, 1, 2, 7))), r"add refuses \[1, 1"),
        (lambda m: ttnn.reshape(put(m, torch.zeros(1, 1, 2, 8)), (1, 1, 3, 5)), "reshape refuses"),
        (lambda m: ttnn.slice(put(m, torch.zeros(1, 1, 2, 8)), [0, 0, 0, 4], [1, 1, 2, 9]), "slice refuses"),
        (lambda m: ttnn.slice(put(m, torch.zeros(1, 1, 2, 8)), [0, 0, 0, -2], [1, 1, 2, 8]), "out of range"),
        (lambda m: ttnn.slice(put(m, torch.zeros(1, 1, 2, 8)), [0, 0], [1, 1]), "each dimension once"),
        (lambda m: ttnn.pad(put(m, torch.zeros(1, 1, 2, 8)), [(0, 1)], 0.0), "each dimension once"),
        (
            lambda m: ttnn.concat([put(m, torch.zeros(1, 8)), put(m, torch.zeros(1, 8), dtype=ttnn.float32)]),
            "different dtypes",
        ),
        (lambda m: ttnn.topk(put(m, torch.zeros(1, 8)), 9), "topk refuses"),
        (
            lambda m: ttnn.embedding(integers(m, torch.zeros(1, 4)), put(m, torch.zeros(9, 8))),
            "ids must be uint32, not INT32",
        ),
        (
            lambda m: ttnn.embedding(integers(m, torch.full((1, 4), 9), ttnn.uint32), put(m, torch.zeros(9, 8))),
            r"embedding refuses \[1, 4\] and \[9, 8\]",
        ),
        (
            lambda m: ttnn.embedding(integers(m, torch.zeros(4), ttnn.uint32), put(m, torch.zeros(9, 8))),
            r"\[B, T\]",
        ),
        (
            lambda m: ttnn.gather(put(m, torch.zeros(1, 8)), 1, integers(m, torch.zeros(1, 2))),
            "uint16 or uint32, not INT32",
        ),
        (
            lambda m: ttnn.scatter(
                put(m, torch.zeros(1, 8)),
                1,
                integers(m, torch.zeros(1, 2), ttnn.uint16),
                put(m, torch.zeros(1, 2), dtype=ttnn.float32),
            ),
            "cannot write FLOAT32 into BFLOAT16",
        ),
        (
            lambda m: ttnn.rms_norm(put(m, torch.zeros(1, 1, 2, 64)), weight=put(m, torch.zeros(2, 32))),
            "the weight must be",
        ),
        (
            lambda m: ttnn.rms_norm(put(m, torch.zeros(1, 1, 2, 64)), weight=put(m, torch.zeros(1, 1, 1, 32))),
            "rms_norm refuses",
        ),
        (lambda m: ttnn.experimental.fast_reduce_nc(put(m, torch.zeros(1, 1, 2, 8)), dims=[2]), "dimensions 0 and 1"),
    ],
)
def test_refusals(
    mesh: ttnn.MeshDevice,
    call: Callable[[ttnn.MeshDevice], ttnn.Tensor],
    message: str,
) -> None:
    with pytest.raises(DeviceError, match=message):
        call(mesh)


@on_chip
def test_tensors_of_two_meshes_are_refused(mesh: ttnn.MeshDevice) -> None:
    here = put(mesh, torch.zeros(1, 1, 8, 8))
    there = put(ttnn.open_mesh_device(ttnn.MeshShape(1, 1)), torch.zeros(1, 1, 8, 8))
    gamma = put(there.device(), torch.zeros(1, 1, 1, 8))
    calls: list[Callable[[], ttnn.Tensor]] = [
        lambda: ttnn.add(here, there),
        lambda: ttnn.linear(here, there),
        lambda: ttnn.matmul(here, there),
        lambda: ttnn.concat([here, there]),
        lambda: ttnn.rms_norm(here, weight=gamma),
    ]
    for call in calls:
        with pytest.raises(DeviceError, match="on different meshes"):
            call()
