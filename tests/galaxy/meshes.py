"""Meshes of the mock Galaxy."""

from collections.abc import Iterator
from contextlib import contextmanager

import ttnn


@contextmanager
def opened(rows: int, columns: int, trace_region_size: int = 0) -> Iterator[ttnn.MeshDevice]:
    """Opens a mesh with the network between its chips enabled; `trace_region_size` is in bytes on each chip."""
    ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
    mesh = ttnn.open_mesh_device(ttnn.MeshShape(rows, columns), trace_region_size=trace_region_size)
    try:
        yield mesh
    finally:
        ttnn.close_mesh_device(mesh)
        ttnn.set_fabric_config(ttnn.FabricConfig.DISABLED)


def allocated_bytes(mesh: ttnn.MeshDevice) -> int:
    """Bytes of DRAM that the allocator has given out on each chip."""
    view = ttnn.get_memory_view(mesh, ttnn.BufferType.DRAM)
    return int(view.total_bytes_allocated_per_bank * view.num_banks)
