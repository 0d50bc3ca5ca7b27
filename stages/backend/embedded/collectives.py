"""Collective ops between the chips along one mesh axis. As on chips, an axis of one chip is refused."""

from collections.abc import Callable, Sequence

import torch

from stages.backend.embedded.chips import refuse, refuse_all_but_tiles, refuse_because
from stages.backend.embedded.dtype import TILE_LAYOUT, TILE_SIZE
from stages.backend.embedded.memory import MemoryConfig
from stages.backend.embedded.program_configs import Topology
from stages.backend.embedded.tensor import Tensor
from stages.errors import DeviceError

Exchange = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
"""A function from the shards of the chips along an axis to their new shards."""


def all_gather(
    input_tensor: Tensor,
    dim: int,
    *,
    cluster_axis: int,
    memory_config: MemoryConfig | None = None,
    num_links: int | None = None,
    topology: Topology | None = None,
) -> Tensor:
    """Gives every chip of the axis all of the axis's shards, concatenated along `dim`."""
    return _exchange(
        "all_gather", input_tensor, cluster_axis, lambda shards: [torch.cat(list(shards), dim)] * len(shards)
    )


def reduce_scatter(
    input_tensor: Tensor,
    dim: int,
    *,
    cluster_axis: int,
    memory_config: MemoryConfig | None = None,
    num_links: int | None = None,
    topology: Topology | None = None,
) -> Tensor:
    """Adds the shards of the axis and gives each chip its part of the sum along `dim`, which must divide evenly."""
    _refuse_uneven("reduce_scatter", input_tensor, dim, cluster_axis)
    return _exchange(
        "reduce_scatter", input_tensor, cluster_axis, lambda shards: _added(shards).chunk(len(shards), dim)
    )


def all_reduce(
    input_tensor: Tensor,
    *,
    cluster_axis: int,
    memory_config: MemoryConfig | None = None,
    num_links: int | None = None,
    topology: Topology | None = None,
) -> Tensor:
    """Gives every chip of the axis the sum of the axis's shards."""
    return _exchange("all_reduce", input_tensor, cluster_axis, lambda shards: [_added(shards)] * len(shards))


def mesh_partition(
    input_tensor: Tensor, dim: int, cluster_axis: int, *, memory_config: MemoryConfig | None = None
) -> Tensor:
    """Keeps each chip's own part of its shard along `dim`, which must divide evenly, and into whole tiles."""
    _refuse_uneven("mesh_partition", input_tensor, dim, cluster_axis)
    _refuse_cut_tiles("mesh_partition", input_tensor, dim, cluster_axis)
    return _exchange(
        "mesh_partition",
        input_tensor,
        cluster_axis,
        lambda shards: [shard.chunk(len(shards), dim)[index] for index, shard in enumerate(shards)],
    )


def all_to_all_async_generic(
    input_tensor: Tensor,
    *,
    in_dim: int,
    out_dim: int,
    cluster_axis: int,
    memory_config: MemoryConfig | None = None,
    num_links: int | None = None,
    topology: Topology | None = None,
) -> Tensor:
    """Gathers `in_dim` over the axis and gives each chip its part of `out_dim`.

    With in_dim=2, out_dim=1 on 8 chips: [1, users, heads / 8, d] becomes [1, users / 8, heads, d].
    """
    refuse_all_but_tiles("all_to_all_async_generic", input_tensor)
    _refuse_uneven("all_to_all_async_generic", input_tensor, out_dim, cluster_axis)

    def swap(shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        parts = [shard.chunk(len(shards), out_dim) for shard in shards]
        return [torch.cat(list(received), in_dim) for received in zip(*parts, strict=True)]

    return _exchange("all_to_all_async_generic", input_tensor, cluster_axis, swap)


def _exchange(op: str, x: Tensor, cluster_axis: int, exchange: Exchange) -> Tensor:
    if _chips(op, x, cluster_axis) < 2:
        refuse(op, f"axis {cluster_axis} of a mesh of {tuple(x.mesh.shape)} has one chip", x)
    if not x.shards:
        raise DeviceError(f"{op}: a tensor was used after deallocate().")
    output = list(x.shards)
    done: dict[tuple[int, ...], Sequence[torch.Tensor]] = {}
    for group in x.mesh.groups[cluster_axis]:
        shards = [x.shards[chip] for chip in group]
        key = tuple(map(id, shards))
        if key not in done:
            try:
                done[key] = exchange(shards)
            except (RuntimeError, IndexError) as error:
                refuse_because(op, error, x)
        for chip, shard in zip(group, done[key], strict=True):
            output[chip] = shard
    return Tensor(output, x.dtype, x.layout, x.mesh)


def _refuse_uneven(op: str, x: Tensor, dim: int, cluster_axis: int) -> None:
    chips = _chips(op, x, cluster_axis)
    shape = x.shape
    if not -len(shape) <= dim < len(shape):
        refuse(op, f"it has no dimension {dim}", x)
    if shape[dim] % chips:
        refuse(op, f"dimension {dim} cannot be cut evenly for {chips} chips", x)


def _refuse_cut_tiles(op: str, x: Tensor, dim: int, cluster_axis: int) -> None:
    shape = x.shape
    in_tiles = x.layout is TILE_LAYOUT and dim % len(shape) >= len(shape) - 2
    if in_tiles and shape[dim] // x.mesh.shape[cluster_axis] % TILE_SIZE:
        refuse(op, f"parts of dimension {dim} must be whole tiles", x)


def _chips(op: str, x: Tensor, cluster_axis: int) -> int:
    if cluster_axis not in (0, 1):
        refuse(op, f"a mesh has axes 0 and 1, not {cluster_axis}", x)
    return x.mesh.shape[cluster_axis]


def _added(shards: Sequence[torch.Tensor]) -> torch.Tensor:
    total = shards[0] + shards[1]
    for shard in shards[2:]:
        total += shard
    return total
