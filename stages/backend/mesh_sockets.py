"""Sockets between the meshes of two processes, which only the real ttnn package has.

Importing this module imports ttnn, whose sockets read MPI's and tt-metal's variables when the world is joined.
"""

from typing import Any

from stages.backend import bind
from stages.mesh_spec import HiddenShard, MeshSocketSpec

ttnn: Any = bind("ttnn")

CORE = (0, 0)
"""The core (x, y) of each chip that holds an end of a socket."""


def join_world() -> None:
    """Makes this process a rank of the MPI world and waits for all ranks; to be called before a mesh is opened."""
    ttnn.init_distributed_context()


def barrier() -> None:
    """Waits for all ranks, for ever if one is dead; other threads continue meanwhile."""
    ttnn.distributed_context_barrier()


class MeshSender:
    """The sending end of a socket between two meshes."""

    def __init__(self, mesh_device: Any, spec: MeshSocketSpec, sender: int, receiver: int) -> None:
        """Opens the socket and waits for the other end; `sender` and `receiver` are mesh ids."""
        self._socket = _socket(mesh_device, spec, sender, receiver)

    def send(self, tensor: Any) -> HiddenShard:
        """Sends each chip's part, without waiting; returns the shape and dtype of the parts."""
        ttnn.experimental.send_async(tensor, self._socket)
        return hidden_shard(tensor)


class MeshReceiver:
    """The receiving end of a socket between two meshes."""

    def __init__(self, mesh_device: Any, spec: MeshSocketSpec, sender: int, receiver: int) -> None:
        """Opens the socket and waits for the other end; `sender` and `receiver` are mesh ids."""
        self._mesh_device = mesh_device
        self._socket = _socket(mesh_device, spec, sender, receiver)

    def receive(self, what: HiddenShard) -> Any:
        """Returns the next tensor at once; ops that use it wait for it on the chips."""
        tensor = ttnn.empty(
            what.shape, dtype=getattr(ttnn, what.dtype), layout=ttnn.TILE_LAYOUT, device=self._mesh_device
        )
        ttnn.experimental.recv_async(tensor, self._socket)
        return tensor


def hidden_shard(tensor: Any) -> HiddenShard:
    """The shape and dtype of each chip's part of a tensor on a mesh."""
    return HiddenShard(tuple(tensor.shape), tensor.dtype.name.lower())


def _socket(mesh_device: Any, spec: MeshSocketSpec, sender: int, receiver: int) -> Any:
    core = ttnn.CoreCoord(*CORE)
    connections = [
        ttnn.SocketConnection(
            ttnn.MeshCoreCoord(ttnn.MeshCoordinate(*connection[:2]), core),
            ttnn.MeshCoreCoord(ttnn.MeshCoordinate(*connection[2:]), core),
        )
        for connection in spec.connections
    ]
    memory = ttnn.SocketMemoryConfig(ttnn.BufferType.L1, spec.fifo_bytes)
    return ttnn.MeshSocket(
        mesh_device, ttnn.SocketConfig(connections, memory, sender_mesh_id=sender, receiver_mesh_id=receiver)
    )
