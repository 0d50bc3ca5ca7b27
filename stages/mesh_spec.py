"""The tensors that pass between the meshes of two stages, on which both agree before sockets are opened."""

import msgspec


class HiddenShard(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The share of a tensor on every chip of a mesh: its shape, in tiles' layout, and ttnn's name of its dtype.

    In a `MeshHidden` a dimension is the greatest that it can be, or 0 where it has no such bound.
    """

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class MeshHidden(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A stage's mesh, rows and columns, and the hidden states on it of each kind of step."""

    mesh_shape: tuple[int, int]
    prefill: HiddenShard
    decode: HiddenShard


Connection = tuple[int, int, int, int]
"""Row and column of the sending chip, then of the receiving one."""


class MeshSocketSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A socket between two meshes: the tensors, the bytes of FIFO on each receiving chip, and the connected chips."""

    hidden: MeshHidden
    fifo_bytes: int
    connections: list[Connection]

    @classmethod
    def between_equals(cls, hidden: MeshHidden, fifo_bytes: int) -> "MeshSocketSpec":
        """Returns a socket on which every chip sends to the one at the same row and column of the next mesh."""
        rows, columns = hidden.mesh_shape
        places = [(row, column) for row in range(rows) for column in range(columns)]
        return cls(hidden, fifo_bytes, [(*place, *place) for place in places])

    def __str__(self) -> str:
        rows, columns = self.hidden.mesh_shape
        return (
            f"a mesh of {rows} x {columns} with {self.hidden.prefill} at prefill and {self.hidden.decode} at decode, "
            f"{self.fifo_bytes} bytes of FIFO and {len(self.connections)} connections"
        )
