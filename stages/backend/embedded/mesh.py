"""Meshes of chips, and the mappers and composers between a torch tensor and a mesh."""

import ctypes
import functools
import platform
from collections.abc import Sequence

from stages.backend.embedded.memory import CoreCoord, CoreGrid
from stages.errors import DeviceError

WORKER_GRID = CoreCoord(8, 8)
"""The worker cores of a Wormhole chip (x, y), by which program configs are sized."""

# From glibc's malloc.h; mallopt(3) explains them.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3

MMAP_FROM = 32 << 20
"""The size in bytes from which an allocation gets pages of its own: the largest that glibc accepts."""

KEPT_FREE = 512 << 20
"""Free bytes at the end of the heap that the process keeps."""


class MeshShape(tuple[int, ...]):
    """The rows and columns of a mesh, such as `MeshShape(4, 8)`."""

    def __new__(cls, *dims: int) -> "MeshShape":
        return super().__new__(cls, dims)

    def mesh_size(self) -> int:
        """The number of chips."""
        size = 1
        for dim in self:
            size *= dim
        return size


class Mesh:
    """A grid of chips, numbered in row-major order. A mesh that is not a `MeshDevice` stands for the host."""

    def __init__(self, shape: Sequence[int]) -> None:
        if len(shape) != 2 or min(shape) < 1:
            raise DeviceError(f"{tuple(shape)} is not a shape of a mesh: give rows and columns.")
        self.shape = MeshShape(*shape)
        rows, columns = shape
        self.size = rows * columns
        self.groups = (
            [[row * columns + column for row in range(rows)] for column in range(columns)],
            [[row * columns + column for column in range(columns)] for row in range(rows)],
        )
        """For each axis, the groups of chips that a collective along it connects."""


class MeshDevice(Mesh):
    """An open mesh of embedded chips."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape)
        self.is_open = True

    def get_num_devices(self) -> int:
        """The number of chips."""
        return self.size

    def create_submeshes(self, submesh_shape: Sequence[int]) -> list["MeshDevice"]:
        """Divides the mesh into meshes of `submesh_shape`. Raises DeviceError if chips are left over."""
        (rows, columns), (own_rows, own_columns) = submesh_shape, self.shape
        if own_rows % rows or own_columns % columns:
            raise DeviceError(f"A mesh of {tuple(self.shape)} has no equal parts of {tuple(submesh_shape)}.")
        return [MeshDevice(submesh_shape) for _ in range(self.size // (rows * columns))]

    def compute_with_storage_grid_size(self) -> CoreCoord:
        """The worker grid of each chip."""
        return WORKER_GRID

    @property
    def core_grid(self) -> CoreGrid:
        """The worker grid of each chip."""
        return CoreGrid(y=WORKER_GRID.y, x=WORKER_GRID.x)


@functools.cache
def keep_freed_memory() -> bool:
    """Stops glibc from returning the memory of every large temporary tensor to the kernel, once for the process.

    Otherwise each op of a prefill, and attention in a decode, causes a page fault for every 4 KiB it writes, which
    costs more than the writing. Returns False under another C library, which is not changed."""
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, MMAP_FROM)) and bool(libc.mallopt(M_TRIM_THRESHOLD, KEPT_FREE))


def open_mesh_device(
    mesh_shape: MeshShape | None = None,
    l1_small_size: int = 0,
    trace_region_size: int = 0,
    num_command_queues: int = 1,
) -> MeshDevice:
    """Opens a mesh, of one chip if no shape is given; the sizes of memory regions have no effect.

    From then on the process keeps the memory that ops free, see `keep_freed_memory`.
    """
    keep_freed_memory()
    return MeshDevice(mesh_shape or MeshShape(1, 1))


def close_mesh_device(mesh_device: MeshDevice) -> None:
    """Closes a mesh; no tensor can be put on it after that."""
    mesh_device.is_open = False


def synchronize_device(device: MeshDevice) -> None:
    """Returns at once, as ops are done when they return."""


class TensorToMesh:
    """A mapper that distributes a torch tensor over a mesh.

    `dims` are the dimensions that the mesh axes split (None replicates); if `flat_dim` is given, that dimension is
    split over all chips in row-major order instead."""

    def __init__(
        self, mesh_shape: Sequence[int], dims: tuple[int | None, int | None], flat_dim: int | None = None
    ) -> None:
        self.mesh_shape = MeshShape(*mesh_shape)
        self.dims = dims
        self.flat_dim = flat_dim


class MeshToTensor:
    """A composer that concatenates the shards of a mesh into a torch tensor.

    Columns are concatenated along `dims[1]`, then rows along `dims[0]`; with `flat_dim`, all chips along that
    dimension."""

    def __init__(self, mesh_shape: Sequence[int], dims: tuple[int, int], flat_dim: int | None = None) -> None:
        self.mesh_shape = MeshShape(*mesh_shape)
        self.dims = dims
        self.flat_dim = flat_dim


def ShardTensor2dMesh(  # noqa: N802 - ttnn's name
    mesh_device: MeshDevice, mesh_shape: Sequence[int], dims: tuple[int | None, int | None]
) -> TensorToMesh:
    """A mapper that splits dimension `dims[0]` over the rows and `dims[1]` over the columns; None replicates."""
    return TensorToMesh(_of(mesh_device, mesh_shape), dims)


def ShardTensorToMesh(mesh_device: MeshDevice, dim: int) -> TensorToMesh:  # noqa: N802 - ttnn's name
    """A mapper that splits `dim` over all chips, in row-major order."""
    return TensorToMesh(mesh_device.shape, (None, None), flat_dim=dim)


def ReplicateTensorToMesh(mesh_device: MeshDevice) -> TensorToMesh:  # noqa: N802 - ttnn's name
    """A mapper that gives every chip the whole tensor; the shards alias it."""
    return TensorToMesh(mesh_device.shape, (None, None))


def ConcatMesh2dToTensor(  # noqa: N802 - ttnn's name
    mesh_device: MeshDevice, mesh_shape: Sequence[int], dims: tuple[int, int]
) -> MeshToTensor:
    """A composer that concatenates rows along `dims[0]` and columns along `dims[1]`, which must differ."""
    if dims[0] == dims[1]:
        raise DeviceError(f"ConcatMesh2dToTensor: rows and columns cannot both be joined along dimension {dims[0]}.")
    return MeshToTensor(_of(mesh_device, mesh_shape), dims)


def ConcatMeshToTensor(mesh_device: MeshDevice, dim: int) -> MeshToTensor:  # noqa: N802 - ttnn's name
    """A composer that concatenates all chips along `dim`, in row-major order."""
    return MeshToTensor(mesh_device.shape, (0, 1), flat_dim=dim)


def _of(mesh_device: MeshDevice, mesh_shape: Sequence[int]) -> Sequence[int]:
    if tuple(mesh_shape) != tuple(mesh_device.shape):
        raise DeviceError(f"A mapper for {tuple(mesh_shape)} cannot serve a mesh of {tuple(mesh_device.shape)}.")
    return mesh_shape
