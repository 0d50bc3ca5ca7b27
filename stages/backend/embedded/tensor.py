"""A tensor on a mesh: one torch tensor for each chip."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch

from stages.backend.embedded.dtype import INTEGERS, ROW_MAJOR_LAYOUT, DataType, Layout, bfloat16, held_in, layout_of
from stages.backend.embedded.memory import MemoryConfig, ShardSpec
from stages.backend.embedded.mesh import Mesh, MeshDevice, MeshToTensor, TensorToMesh
from stages.errors import DeviceError

Derived = TypeVar("Derived")

HOST = Mesh((1, 1))
"""The mesh of a tensor that is whole and on the host."""


class Tensor:
    """A tensor on a mesh: shards of one shape, in row-major order of the chips.

    Replication is aliasing: chips with the same values share one torch tensor, so that results from it are computed
    once. Shards of integers and weights never change after they are created, so that ops may `remember` what they
    derive from them.

    `shard_spec` has the cores over which `to_memory_config` spread each shard, if it did.
    """

    __slots__ = ("_derived", "dtype", "layout", "mesh", "shard_spec", "shards")

    def __init__(
        self,
        shards: list[torch.Tensor],
        dtype: DataType,
        layout: Layout,
        mesh: Mesh,
        shard_spec: ShardSpec | None = None,
    ) -> None:
        self.shards = shards
        self.dtype = dtype
        self.layout = layout
        self.mesh = mesh
        self.shard_spec = shard_spec
        self._derived: dict[Hashable, Any] | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape on each chip."""
        if not self.shards:
            raise DeviceError("A tensor was used after deallocate().")
        return self.shards[0].shape

    def device(self) -> MeshDevice:
        """The mesh that holds the tensor. Raises DeviceError for a tensor on the host."""
        if not isinstance(self.mesh, MeshDevice):
            raise DeviceError("The tensor is on the host; move it with to_device().")
        return self.mesh

    def remember(self, key: Hashable, make: Callable[[], Derived]) -> Derived:
        """Returns what `make` gave at the first call with `key`, such as a weight in the form that a product uses."""
        if self._derived is None:
            self._derived = {}
        derived: Derived | None = self._derived.get(key)
        if derived is None:
            derived = self._derived[key] = make()
        return derived

    def forget_derived(self) -> None:
        """Drops all that was derived from the shards, as they have changed."""
        self._derived = None

    def forget(self) -> None:
        """Drops the shards and all that was derived from them."""
        self.shards = []
        self._derived = None

    def __repr__(self) -> str:
        shape = list(self.shards[0].shape) if self.shards else "deallocated"
        return f"Tensor({shape} on each of {self.mesh.size} chips, {self.dtype.name}, {self.layout.name})"


def from_torch(
    tensor: torch.Tensor,
    dtype: DataType | None = None,
    *,
    layout: Layout | None = None,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
    mesh_mapper: TensorToMesh | None = None,
) -> Tensor:
    """Distributes `tensor` with `mesh_mapper`, or replicates it; without `device` it stays on the host.

    The dtype is that of `tensor` unless `dtype` is given. A float tensor that has the right dtype already is used
    without a copy; a matrix that is the transposed view of a contiguous one keeps that storage, shard by shard. Raises
    DeviceError if the shards would be uneven, the mapper is for another mesh, or the dtype does not exist in the
    layout."""
    dtype = dtype or _ttnn_dtype(tensor)
    layout = layout_of(dtype, layout)
    held = tensor.to(held_in(dtype), copy=dtype in INTEGERS)
    place = _place(device, mesh_mapper)
    shards = _cut(held, mesh_mapper) if mesh_mapper else [held] * place.size
    return Tensor(shards, dtype, layout, place)


def _place(device: MeshDevice | None, mapper: TensorToMesh | None) -> Mesh:
    if device is None:
        return Mesh(mapper.mesh_shape) if mapper and mapper.mesh_shape.mesh_size() > 1 else HOST
    if not device.is_open:
        raise DeviceError("The mesh is closed: open it again before tensors are put on it.")
    if mapper and mapper.mesh_shape != device.shape:
        raise DeviceError(f"A mapper for {tuple(mapper.mesh_shape)} cannot serve a mesh of {tuple(device.shape)}.")
    return device


def _cut(tensor: torch.Tensor, mapper: TensorToMesh) -> list[torch.Tensor]:
    if mapper.flat_dim is not None:
        return _parts(tensor, mapper.mesh_shape.mesh_size(), mapper.flat_dim)
    rows, columns = mapper.mesh_shape
    by_row, by_column = mapper.dims
    if by_row is None:
        return _parts(tensor, columns, by_column) * rows
    return [shard for row in _parts(tensor, rows, by_row) for shard in _parts(row, columns, by_column)]


def _parts(tensor: torch.Tensor, count: int, dim: int | None) -> list[torch.Tensor]:
    if dim is None or count == 1:
        return [tensor] * count
    if not -tensor.dim() <= dim < tensor.dim() or tensor.shape[dim] % count:
        raise DeviceError(f"A tensor of {list(tensor.shape)} cannot be cut evenly into {count} along {dim}.")
    return [dense(part) for part in tensor.chunk(count, dim)]


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` without gaps: contiguous, or with its last two dimensions transposed in memory if they were before.

    [K, N] weights are stored as [N, K] because products with few rows read them faster on a CPU.
    """
    if tensor.dim() < 2 or tensor.stride(-1) == 1 or tensor.stride(-2) != 1:
        return tensor.contiguous()
    return tensor.transpose(-2, -1).contiguous().transpose(-2, -1)


def _ttnn_dtype(tensor: torch.Tensor) -> DataType:
    if tensor.is_floating_point():
        return DataType.FLOAT32 if tensor.dtype == torch.float32 else bfloat16
    return DataType.INT32


def to_torch(tensor: Tensor, *, mesh_composer: MeshToTensor | None = None) -> torch.Tensor:
    """Returns the shards as one torch tensor, which may alias one; without a composer there must be one shard."""
    shards = tensor.shards
    if not shards:
        raise DeviceError("A tensor was used after deallocate().")
    if mesh_composer is None:
        if len(shards) > 1:
            raise DeviceError(f"to_torch needs a mesh_composer to join {len(shards)} shards.")
        return shards[0]
    if len(shards) != mesh_composer.mesh_shape.mesh_size():
        raise DeviceError(f"A composer for {tuple(mesh_composer.mesh_shape)} cannot join {len(shards)} shards.")
    if mesh_composer.flat_dim is not None:
        return torch.cat(shards, mesh_composer.flat_dim)
    rows, columns = mesh_composer.mesh_shape
    down, across = mesh_composer.dims
    return torch.cat([torch.cat(shards[row * columns : (row + 1) * columns], across) for row in range(rows)], down)


def to_device(tensor: Tensor, device: MeshDevice, *, memory_config: MemoryConfig | None = None) -> Tensor:
    """Moves a tensor from the host to a mesh; a whole tensor is replicated.

    Raises DeviceError if it was sharded for another mesh.
    """
    _place(device, None)
    if tensor.mesh is HOST:
        return Tensor(tensor.shards * device.size, tensor.dtype, tensor.layout, device)
    if tensor.mesh.shape != device.shape:
        raise DeviceError(
            f"A tensor cut for a mesh of {tuple(tensor.mesh.shape)} cannot go onto one of {tuple(device.shape)}."
        )
    return Tensor(tensor.shards, tensor.dtype, tensor.layout, device)


def from_device(tensor: Tensor) -> Tensor:
    """Moves a tensor to the host."""
    place = Mesh(tensor.mesh.shape) if tensor.mesh.size > 1 else HOST
    return Tensor(tensor.shards, tensor.dtype, tensor.layout, place)


def full(
    shape: Sequence[int],
    fill_value: float,
    *,
    dtype: DataType = bfloat16,
    layout: Layout | None = None,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Creates `shape` on each chip, filled with `fill_value`; chips share a shard until an op writes to it."""
    place = _place(device, None)
    shard = torch.full(tuple(shape), fill_value, dtype=held_in(dtype))
    return Tensor([shard] * place.size, dtype, layout_of(dtype, layout), place)


def zeros(
    shape: Sequence[int],
    *,
    dtype: DataType = bfloat16,
    layout: Layout | None = None,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Creates a tensor of zeros of `shape` on each chip; memory is allocated when it is written."""
    place = _place(device, None)
    shard = torch.zeros(tuple(shape), dtype=held_in(dtype))
    return Tensor([shard] * place.size, dtype, layout_of(dtype, layout), place)


def empty(
    shape: Sequence[int],
    *,
    dtype: DataType = bfloat16,
    layout: Layout = ROW_MAJOR_LAYOUT,
    device: MeshDevice | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Creates zeros of `shape` on each chip: unwritten values are never NaN, which masked products would let through.

    Raises DeviceError for block floats unless `layout` is given as TILE.
    """
    return zeros(shape, dtype=dtype, layout=layout, device=device, memory_config=memory_config)


def get_device_tensors(tensor: Tensor) -> list[Tensor]:
    """Returns each chip's shard as a tensor on the host."""
    return [Tensor([shard], tensor.dtype, tensor.layout, HOST) for shard in tensor.shards]


def deallocate(tensor: Tensor, force: bool = True) -> None:
    """Drops the shards; the tensor cannot be used after that, but results from it can."""
    tensor.forget()
