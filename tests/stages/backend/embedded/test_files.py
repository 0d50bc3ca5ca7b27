"""Files of tensors: their values after loading, where these are in memory, and refusals."""

import ctypes
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.backend import set_float_dtype, ttnn
from stages.errors import DeviceError
from tests.support.disks import files_of_at_most
from tests.support.embedded_meshes import assert_everywhere, on_chip, on_meshes, put, shards

pytestmark = pytest.mark.usefixtures("float32")

MIB = 1 << 20


@on_meshes
@pytest.mark.parametrize("dims", [(None, None), (None, 3), (2, None), (2, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_round_trip(
    mesh: ttnn.MeshDevice, dims: tuple[int | None, int | None], transposed: bool, tmp_path: Path
) -> None:
    weight = torch.randn(64, 32).t()[None, None] if transposed else torch.randn(1, 1, 32, 64)
    written = put(mesh, weight, dims, dtype=ttnn.bfloat8_b)
    path = tmp_path / "weight.tensorbin"
    ttnn.dump_tensor(path, written)
    read = ttnn.load_tensor(str(path), device=mesh)
    assert read.device() is mesh
    assert (read.dtype, read.layout, read.shape) == (ttnn.bfloat8_b, ttnn.TILE_LAYOUT, written.shape)
    for old, new in zip(shards(written), shards(read), strict=True):
        assert torch.equal(old, new)
        assert new.stride()[-2:] == old.stride()[-2:]
    assert shards(read)[0].data_ptr() % 64 == 0
    assert len({shard.data_ptr() for shard in shards(read)}) == len({shard.data_ptr() for shard in shards(written)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kind_of_dtype_and_a_tensor_on_the_host(dtype: torch.dtype, tmp_path: Path) -> None:
    set_float_dtype(dtype)
    for kind in (ttnn.float32, ttnn.bfloat16, ttnn.int32, ttnn.uint32):
        tensor = ttnn.from_torch(torch.arange(12).view(3, 4), kind)
        ttnn.dump_tensor(tmp_path / "values.tensorbin", tensor)
        read = ttnn.load_tensor(tmp_path / "values.tensorbin")
        assert (read.dtype, read.layout) == (kind, ttnn.ROW_MAJOR_LAYOUT)
        assert torch.equal(ttnn.to_torch(read), ttnn.to_torch(tensor))


@on_chip
def test_the_file_is_safetensors(mesh: ttnn.MeshDevice, tmp_path: Path) -> None:
    weight = torch.randn(1, 1, 8, 16)
    ttnn.dump_tensor(tmp_path / "weight.tensorbin", put(mesh, weight))
    assert torch.equal(load_file(tmp_path / "weight.tensorbin")["0"], weight)


@on_chip
@pytest.mark.parametrize("missing", [1, 100, 5000])
def test_a_file_that_cannot_be_written_whole_is_an_error(mesh: ttnn.MeshDevice, missing: int, tmp_path: Path) -> None:
    weight = put(mesh, torch.randn(1, 1, 64, 97))
    ttnn.dump_tensor(tmp_path / "weight.tensorbin", weight)
    size = (tmp_path / "weight.tensorbin").stat().st_size
    with files_of_at_most(size - missing), pytest.raises(OSError, match="File too large"):
        ttnn.dump_tensor(tmp_path / "cut.tensorbin", weight)


def anonymous_bytes() -> int:
    """The memory of this process that no file backs, after malloc has returned its reserve."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    pytest.skip("this kernel does not tell RssAnon")


@on_chip
def test_loading_and_reading_takes_no_anonymous_memory(mesh: ttnn.MeshDevice, tmp_path: Path) -> None:
    path = tmp_path / "large.tensorbin"
    ttnn.dump_tensor(path, put(mesh, torch.ones(1, 1, 4096, 4096).mT))
    before = anonymous_bytes()
    read = ttnn.load_tensor(path, device=mesh)
    assert float(shards(read)[0].sum()) == 4096 * 4096
    assert anonymous_bytes() - before < 8 * MIB


@on_meshes
def test_refusals(mesh: ttnn.MeshDevice, tmp_path: Path) -> None:
    path = tmp_path / "weight.tensorbin"
    ttnn.dump_tensor(path, put(mesh, torch.zeros(1, 1, 8, 8)))
    with pytest.raises(DeviceError, match=r"cut for a mesh of \(\d, \d\), not of \(3, 5\)"):
        ttnn.load_tensor(path, device=ttnn.open_mesh_device(ttnn.MeshShape(3, 5)))
    with pytest.raises(DeviceError, match=r"must end in \.tensorbin"):
        ttnn.dump_tensor(tmp_path / "weight.bin", put(mesh, torch.zeros(1)))
    with pytest.raises(DeviceError, match=r"Cannot read .*missing\.tensorbin"):
        ttnn.load_tensor(tmp_path / "missing.tensorbin")
    set_float_dtype(torch.bfloat16)
    with pytest.raises(DeviceError, match=r"holds torch\.float32, but this process holds BFLOAT16"):
        ttnn.load_tensor(path, device=mesh)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DeviceError, match="Cannot read"):
        ttnn.load_tensor(path)


@on_meshes
def test_as_tensor_writes_once_and_then_reads(mesh: ttnn.MeshDevice, tmp_path: Path) -> None:
    first, second = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    mapper = ttnn.ReplicateTensorToMesh(mesh)
    for values in (first, second):
        tensor = ttnn.as_tensor(
            values,
            ttnn.bfloat16,
            layout=ttnn.TILE_LAYOUT,
            device=mesh,
            memory_config=ttnn.DRAM_MEMORY_CONFIG,
            cache_file_name=tmp_path / "made" / "weight",
            mesh_mapper=mapper,
        )
        assert_everywhere(tensor, first)
    uncached = ttnn.as_tensor(
        second, ttnn.bfloat16, device=mesh, memory_config=ttnn.DRAM_MEMORY_CONFIG, mesh_mapper=mapper
    )
    assert_everywhere(uncached, second)
