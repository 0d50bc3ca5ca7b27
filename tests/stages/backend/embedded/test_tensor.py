"""Tensors on a mesh: distribution, composition, replication, dtypes."""

import sys

import pytest
import torch

from stages.backend import bind, set_float_dtype, ttnn
from stages.errors import DeviceError
from tests.support.embedded_meshes import SHAPES, on_chip, on_meshes, put, shards

pytestmark = pytest.mark.usefixtures("float32")


def test_shards_lie_row_major_and_join_again() -> None:
    device = ttnn.open_mesh_device(ttnn.MeshShape(2, 4))
    whole = torch.arange(4 * 8.0).view(4, 8)
    tensor = put(device, whole, (0, 1))
    assert tensor.shape == (2, 2)
    for chip_number, shard in enumerate(shards(tensor)):
        row, column = divmod(chip_number, 4)
        assert torch.equal(shard, whole[2 * row : 2 * row + 2, 2 * column : 2 * column + 2])
    joined = ttnn.to_torch(tensor, mesh_composer=ttnn.ConcatMesh2dToTensor(device, (2, 4), (0, 1)))
    assert torch.equal(joined, whole)


def test_flat_sharding_numbers_chips_row_major() -> None:
    device = ttnn.open_mesh_device(ttnn.MeshShape(2, 4))
    whole = torch.arange(16.0).view(1, 16)
    tensor = ttnn.from_torch(whole, ttnn.float32, device=device, mesh_mapper=ttnn.ShardTensorToMesh(device, 1))
    assert [shard.tolist() for shard in shards(tensor)] == [[[2.0 * i, 2.0 * i + 1]] for i in range(8)]
    assert torch.equal(ttnn.to_torch(tensor, mesh_composer=ttnn.ConcatMeshToTensor(device, 1)), whole)


def test_replicas_are_one_tensor_and_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device = ttnn.open_mesh_device(ttnn.MeshShape(2, 4))
    calls = 0
    plain_add = torch.add

    def counting(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return plain_add(a, b)

    monkeypatch.setattr(torch, "add", counting)
    by_column = put(device, torch.randn(1, 1, 2, 8), (None, 3))
    total = ttnn.add(by_column, by_column)
    assert calls == 4
    assert len({shard.data_ptr() for shard in shards(total)}) == 4


def test_a_tensor_waits_on_the_host_until_it_is_put_on_a_mesh() -> None:
    device = ttnn.open_mesh_device(ttnn.MeshShape(1, 8))
    whole = torch.randn(1, 1, 4, 16)
    mapper = ttnn.ShardTensor2dMesh(device, (1, 8), (None, 3))
    host = ttnn.from_torch(whole, ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, mesh_mapper=mapper)
    with pytest.raises(DeviceError, match="on the host"):
        host.device()
    moved = ttnn.to_device(host, device)
    assert moved.device() is device
    assert torch.equal(shards(moved)[3], whole[..., 6:8])
    with pytest.raises(DeviceError, match="different meshes, or one is on the host"):
        ttnn.add(moved, host)
    back = ttnn.from_device(moved)
    with pytest.raises(DeviceError, match="cut for a mesh of"):
        ttnn.to_device(back, ttnn.open_mesh_device(ttnn.MeshShape(2, 4)))


def test_a_transposed_weight_keeps_its_storage_in_every_shard() -> None:
    device = ttnn.open_mesh_device(ttnn.MeshShape(1, 8))
    weight = torch.randn(32, 64).t()[None, None]
    for dims in ((None, 2), (None, 3), (None, None)):
        for shard in shards(put(device, weight, dims)):
            assert shard.transpose(-2, -1).is_contiguous()


@on_chip
def test_floats_are_held_in_the_process_dtype_except_float32(mesh: ttnn.MeshDevice) -> None:
    set_float_dtype(torch.bfloat16)
    values = torch.randn(2, 3)
    for dtype, held in (
        (ttnn.bfloat16, torch.bfloat16),
        (ttnn.bfloat8_b, torch.bfloat16),
        (ttnn.bfloat4_b, torch.bfloat16),
        (ttnn.float32, torch.float32),
    ):
        assert ttnn.to_torch(put(mesh, values, dtype=dtype)).dtype == held
    mixed = ttnn.add(put(mesh, values), put(mesh, values, dtype=ttnn.float32))
    assert mixed.dtype is ttnn.bfloat16
    assert ttnn.to_torch(mixed).dtype == torch.bfloat16
    with pytest.raises(DeviceError, match=r"torch\.float16"):
        set_float_dtype(torch.float16)


@on_meshes
def test_what_cannot_be_cut_or_joined_is_refused(mesh: ttnn.MeshDevice) -> None:
    other = ttnn.open_mesh_device(ttnn.MeshShape(3, 5))
    with pytest.raises(DeviceError, match=r"mesh of \(3, 5\)"):
        ttnn.from_torch(torch.zeros(15), device=other, mesh_mapper=ttnn.ReplicateTensorToMesh(mesh))
    with pytest.raises(DeviceError, match=r"\[4, 14\] cannot be cut evenly into 3 along 0"):
        put(other, torch.zeros(4, 14), (0, 1))
    with pytest.raises(DeviceError, match="cannot be cut evenly"):
        put(other, torch.zeros(3, 5), (2, None))
    with pytest.raises(DeviceError, match="mesh_composer to join 15 shards"):
        ttnn.to_torch(put(other, torch.zeros(1)))
    with pytest.raises(DeviceError, match="both be joined along"):
        ttnn.ConcatMesh2dToTensor(other, (3, 5), (1, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_closed_meshes_and_deallocated_tensors_are_refused(shape: tuple[int, int]) -> None:
    mesh = ttnn.open_mesh_device(ttnn.MeshShape(*shape))
    tensor = put(mesh, torch.zeros(1, 1, 32, 32))
    kept = ttnn.reshape(tensor, (1, 32, 1, 32))
    ttnn.deallocate(tensor)
    for use in (
        lambda: tensor.shape,
        lambda: ttnn.silu(tensor),
        lambda: ttnn.add(kept, tensor),
        lambda: ttnn.linear(kept, tensor),
        lambda: ttnn.typecast(tensor, ttnn.float32),
    ):
        with pytest.raises(DeviceError, match="after deallocate"):
            use()
    assert torch.equal(shards(kept)[0], torch.zeros(1, 32, 1, 32))
    ttnn.close_mesh_device(mesh)
    with pytest.raises(DeviceError, match="closed"):
        put(mesh, torch.zeros(1))


def test_a_mesh_is_shared_out_as_meshes_of_their_own() -> None:
    mesh = ttnn.open_mesh_device(ttnn.MeshShape(4, 8))
    parts = mesh.create_submeshes(ttnn.MeshShape(2, 4))
    assert [tuple(part.shape) for part in parts] == [(2, 4)] * 4
    with pytest.raises(DeviceError, match="different meshes"):
        ttnn.copy(put(parts[0], torch.zeros(1)), put(parts[1], torch.zeros(1)))
    with pytest.raises(DeviceError, match=r"no equal parts of \(3, 8\)"):
        mesh.create_submeshes(ttnn.MeshShape(3, 8))


def test_a_mesh_has_two_positive_dimensions() -> None:
    with pytest.raises(DeviceError, match=r"\(0, 8\)"):
        ttnn.open_mesh_device(ttnn.MeshShape(0, 8))
    assert tuple(ttnn.open_mesh_device().shape) == (1, 1)


def test_binding_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bind("embedded") is ttnn
    with pytest.raises(DeviceError, match="'embedded' or 'ttnn'"):
        bind("cuda")
    monkeypatch.setitem(sys.modules, "ttnn", None)
    with pytest.raises(DeviceError, match=r"install galaxyline\[galaxy\]"):
        bind("ttnn")
