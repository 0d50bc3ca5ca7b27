"""Ops of the embedded device have the values of ttnn's own golden functions, on random inputs."""

from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path

import pytest
import torch
import ttnn

from stages.backend import embedded
from stages.backend.embedded.dtype import held_in, set_float_dtype
from tests.galaxy.golden_calls import Call, Held, OnHost, attention_calls, calls
from tests.support.op_names import OPS

SHAPES = [(1, 1, 32, 64), (1, 4, 5, 96), (2, 3, 33, 40)]
SEEDS = [0, 1]
MESH_SHAPE = (2, 4)

OF_OTHER_TESTS = {
    "all_gather",
    "all_reduce",
    "fused_rms_minimal",
    "load_tensor",
    "mesh_partition",
    "reduce_scatter",
    "to_device",
}

WITHOUT = {
    "ConcatMesh2dToTensor",
    "ConcatMeshToTensor",
    "ReplicateTensorToMesh",
    "ShardTensor2dMesh",
    "ShardTensorToMesh",
    "begin_trace_capture",
    "close_mesh_device",
    "create_global_semaphore",
    "create_sharded_memory_config",
    "deallocate",
    "dump_tensor",
    "empty",
    "end_trace_capture",
    "execute_trace",
    "experimental.all_gather_minimal_matmul_async",
    "experimental.all_to_all_async_generic",
    "experimental.deepseek_grouped_gate",
    "experimental.deepseek_prefill.moe_grouped_topk",
    "experimental.deepseek_prefill.rotary_embedding_indexed",
    "experimental.fast_reduce_nc",
    "experimental.minimal_matmul",
    "experimental.nlp_concat_heads",
    "experimental.nlp_create_q_heads_split",
    "experimental.paged_fill_cache",
    "experimental.paged_update_cache",
    "experimental.rotary_embedding_llama",
    "get_device_tensors",
    "num_cores_to_corerangeset",
    "open_mesh_device",
    "release_trace",
    "set_fabric_config",
    "synchronize_device",
}
"""Functions without a golden function in ttnn 0.81.1; the embedded device's own tests check the ops among them."""


@pytest.fixture(autouse=True)
def _float32() -> Iterator[None]:
    before = held_in(embedded.bfloat16)
    set_float_dtype(torch.float32)
    yield
    set_float_dtype(before)


def of_ttnn(name: str) -> object:
    return reduce(getattr, name.split("."), ttnn)


def golden_of(name: str) -> Callable[..., object] | None:
    try:
        golden: Callable[..., object] = ttnn.get_golden_function(of_ttnn(name))
    except (AttributeError, RuntimeError):
        return None
    return golden


def for_embedded(value: object, mesh: embedded.MeshDevice) -> object:
    if isinstance(value, OnHost):
        return value.tensor
    if isinstance(value, torch.Tensor):
        value = Held(value, embedded.bfloat16)
    if isinstance(value, Held):
        return embedded.from_torch(value.tensor, value.dtype, layout=value.layout, device=mesh)
    if isinstance(value, list):
        return [for_embedded(one, mesh) for one in value]
    return value


def for_golden(value: object) -> object:
    if isinstance(value, Held | OnHost):
        return value.tensor
    if isinstance(value, embedded.DataType | embedded.UnaryOpType | embedded.Layout):
        return getattr(getattr(ttnn, type(value).__name__), value.name)
    if isinstance(value, list):
        return [for_golden(one) for one in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def assert_equals_golden(call: Call, mesh: embedded.MeshDevice) -> None:
    golden = golden_of(call.op)
    assert golden is not None
    expected = golden(
        *[for_golden(value) for value in call.arguments],
        **{name: for_golden(value) for name, value in call.keywords.items()},
    )
    result = OPS[call.op](
        *[for_embedded(value, mesh) for value in call.arguments],
        **{name: for_embedded(value, mesh) for name, value in call.keywords.items()},
    )
    results, wanted = (value if isinstance(value, tuple | list) else [value] for value in (result, expected))
    assert len(results) == len(wanted)
    for one, other in zip(results, wanted, strict=True):
        got = embedded.to_torch(one) if isinstance(one, embedded.Tensor) else one
        torch.testing.assert_close(
            got.double(), other.double(), rtol=1e-5, atol=1e-5, msg=lambda message: f"{call.op}: {message}"
        )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ops_equal_their_golden_functions(shape: tuple[int, int, int, int], seed: int) -> None:
    torch.manual_seed(seed)
    mesh = embedded.open_mesh_device()
    for call in calls(shape):
        assert_equals_golden(call, mesh)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("block_size", [32, 64])
def test_attention_equals_its_golden_functions(block_size: int, seed: int) -> None:
    torch.manual_seed(seed)
    mesh = embedded.open_mesh_device()
    for call in attention_calls(block_size):
        assert_equals_golden(call, mesh)


COLLECTIVES: list[tuple[str, tuple[int, ...], int]] = [
    ("all_gather", (3,), 1),
    ("all_gather", (2,), 0),
    ("reduce_scatter", (3,), 1),
    ("reduce_scatter", (2,), 0),
    ("all_reduce", (), 1),
    ("all_reduce", (), 0),
    ("mesh_partition", (1,), 1),
    ("mesh_partition", (1,), 0),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("op", "dims", "axis"), COLLECTIVES)
def test_collectives_equal_their_golden_functions(op: str, dims: tuple[int, ...], axis: int, seed: int) -> None:
    torch.manual_seed(seed)
    mesh = embedded.open_mesh_device(embedded.MeshShape(*MESH_SHAPE))
    # Each row has its own tokens and each column its own values, as hidden states are distributed; an axis that
    # partitions a tensor has equal shards.
    placed: list[int | None] = [2, 3]
    joined_by = [2, 3]
    if op == "mesh_partition":
        placed[axis], joined_by[axis] = None, dims[0]
    mapper = embedded.ShardTensor2dMesh(mesh, MESH_SHAPE, (placed[0], placed[1]))
    x = torch.randn(1, 8, 64 * MESH_SHAPE[0], 32 * MESH_SHAPE[1])
    own = embedded.from_torch(x, embedded.bfloat16, layout=embedded.TILE_LAYOUT, device=mesh, mesh_mapper=mapper)
    shards = [embedded.to_torch(one).clone() for one in embedded.get_device_tensors(own)]
    golden = golden_of(op)
    assert golden is not None
    expected = golden(
        shards, *dims, cluster_axis=axis, _ttnn_golden_mesh_shape=MESH_SHAPE, _ttnn_golden_mesh_shard_dims=placed
    )
    composer = embedded.ConcatMesh2dToTensor(mesh, MESH_SHAPE, (joined_by[0], joined_by[1]))
    whole = embedded.to_torch(OPS[op](own, *dims, cluster_axis=axis), mesh_composer=composer)
    if op in ("all_gather", "all_reduce"):
        # All chips of the axis have equal results, of which the golden function keeps one.
        whole = whole.chunk(MESH_SHAPE[axis], joined_by[axis])[0]
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_norm_with_its_residual_equals_its_golden_function(seed: int) -> None:
    torch.manual_seed(seed)
    mesh = embedded.open_mesh_device(embedded.MeshShape(*MESH_SHAPE))
    width = 64 * MESH_SHAPE[1]
    x, residual, gains = torch.randn(1, 1, 32, width), torch.randn(1, 1, 32, width), torch.randn(width)
    by_column = embedded.ShardTensor2dMesh(mesh, MESH_SHAPE, (None, 3))
    held = [
        embedded.from_torch(one, embedded.bfloat16, layout=embedded.TILE_LAYOUT, device=mesh, mesh_mapper=by_column)
        for one in (x, residual)
    ]
    rows = embedded.ShardTensor2dMesh(mesh, MESH_SHAPE, (None, 2))
    weight = embedded.from_torch(gains.view(1, 1, -1, 32), embedded.bfloat16, device=mesh, mesh_mapper=rows)
    program = embedded.LayerNormShardedMultiCoreProgramConfig(
        compute_with_storage_grid_size=(2, 1), subblock_w=1, block_h=1, block_w=1, inplace=False
    )
    one_core = embedded.num_cores_to_corerangeset(1, embedded.CoreCoord(8, 8))
    stats = embedded.zeros((1, 1, 32, 32 * MESH_SHAPE[1]), layout=embedded.TILE_LAYOUT, device=mesh)
    normed = embedded.fused_rms_minimal(
        held[0],
        program,
        1,
        mesh,
        embedded.create_global_semaphore(mesh, one_core, 0),
        residual_input_tensor=held[1],
        epsilon=1e-3,
        weight=weight,
        stats=stats,
    )
    golden = golden_of("fused_rms_minimal")
    assert golden is not None
    composer = embedded.ConcatMesh2dToTensor(mesh, MESH_SHAPE, (0, 3))
    expected = golden(x, residual_input_tensor=residual, epsilon=1e-3, weight=gains)
    torch.testing.assert_close(embedded.to_torch(normed, mesh_composer=composer)[:1], expected, rtol=1e-5, atol=1e-5)
    # What chips write over the residual.
    torch.testing.assert_close(embedded.to_torch(held[1], mesh_composer=composer)[:1], x + residual)


def test_moves_between_host_and_mesh_equal_their_golden_functions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, 32, 64)
    mesh = embedded.open_mesh_device()
    host = embedded.from_torch(x, embedded.bfloat16, layout=embedded.TILE_LAYOUT)
    moved, loaded = golden_of("to_device"), golden_of("load_tensor")
    assert moved is not None
    assert loaded is not None
    torch.testing.assert_close(embedded.to_torch(embedded.to_device(host, mesh)), moved(x, None))
    own, theirs = tmp_path / "own.tensorbin", tmp_path / "theirs.tensorbin"
    embedded.dump_tensor(own, host)
    ttnn.dump_tensor(str(theirs), ttnn.from_torch(x, ttnn.float32, layout=ttnn.TILE_LAYOUT))
    torch.testing.assert_close(embedded.to_torch(embedded.load_tensor(own, device=mesh)), loaded(str(theirs)))


def test_every_op_with_a_golden_function_is_held_against_it() -> None:
    without = {name for name in OPS if golden_of(name) is None}
    assert without == WITHOUT
    called = {call.op for call in [*calls(SHAPES[0]), *attention_calls(32)]}
    assert called | OF_OTHER_TESTS == OPS.keys() - without
