"""The programs that chips run for a call: what ttnn's graph of it says they executed, on each of them."""

from collections.abc import Callable
from typing import Any

import ttnn


def programs(mesh: ttnn.MeshDevice, call: Callable[[], object]) -> int:
    """Calls `call` twice, as the first time makes what is kept for others, and counts the programs of the second."""
    call()
    return executed(mesh, _graph(call))


def executed(mesh: ttnn.MeshDevice, graph: list[dict[str, Any]]) -> int:
    """The programs of a graph on each chip; all chips run the same ones."""
    count = len([node for node in graph if node["node_type"] == "program_execution"])
    each, rest = divmod(count, int(mesh.get_num_devices()))
    assert rest == 0
    return each


def _graph(call: Callable[[], object]) -> list[dict[str, Any]]:
    ttnn.graph.begin_graph_capture(ttnn.graph.RunMode.NORMAL)
    try:
        call()
    finally:
        graph: list[dict[str, Any]] = ttnn.graph.end_graph_capture()
    return graph
