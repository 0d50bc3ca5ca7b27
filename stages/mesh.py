"""The mesh of a stage: opened with the network between its chips, and closed with it."""

from stages.backend import ttnn

TRACE_REGION_BYTES = 45_684_326
"""Of each chip, for the traces of a stage: what tt-metal's own demo sets aside for the decode trace of all 61 layers,
found by trial (38,070,272 bytes and a fifth more; models/demos/deepseek_v3/demo/demo.py)."""


def open_mesh(rows: int, columns: int, *, enable_trace: bool) -> ttnn.MeshDevice:
    """Opens rows x columns chips."""
    if rows * columns > 1:
        # Before the mesh: collectives need the network between chips.
        ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
    trace_region = TRACE_REGION_BYTES if enable_trace else 0
    return ttnn.open_mesh_device(ttnn.MeshShape(rows, columns), trace_region_size=trace_region)


def close_mesh(mesh_device: ttnn.MeshDevice) -> None:
    """Gives up the mesh and its network."""
    has_network = mesh_device.get_num_devices() > 1
    ttnn.close_mesh_device(mesh_device)
    if has_network:
        ttnn.set_fabric_config(ttnn.FabricConfig.DISABLED)
