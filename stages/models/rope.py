"""Rotary positions on a mesh: tables of cosines and sines, looked up once a step for all layers."""

from typing import NamedTuple

import torch

from stages.backend import ttnn


class Rope(NamedTuple):
    """Cosines and sines of a step's tokens, [1, 1, tokens, rope width] each, and the matrix that swaps pairs."""

    cos: ttnn.Tensor
    sin: ttnn.Tensor
    transformation: ttnn.Tensor


class RopeTables(NamedTuple):
    """Cosines and sines of all positions, [positions, rope width] each, on every chip."""

    cos: ttnn.Tensor
    sin: ttnn.Tensor
    transformation: ttnn.Tensor

    @classmethod
    def on_mesh(
        cls, cos: torch.Tensor, sin: torch.Tensor, transformation: torch.Tensor, mesh_device: ttnn.MeshDevice
    ) -> "RopeTables":
        """Puts cosines and sines [positions, rope width] and the matrix [1, 1, size, size] on every chip."""
        replicate = ttnn.ReplicateTensorToMesh(mesh_device)
        tables = [
            ttnn.from_torch(
                table, dtype=ttnn.bfloat16, layout=ttnn.ROW_MAJOR_LAYOUT, device=mesh_device, mesh_mapper=replicate
            )
            for table in (cos, sin)
        ]
        matrix = ttnn.from_torch(
            transformation,
            dtype=ttnn.bfloat16,
            layout=ttnn.TILE_LAYOUT,
            device=mesh_device,
            mesh_mapper=replicate,
        )
        return cls(tables[0], tables[1], matrix)

    def look_up(self, positions: ttnn.Tensor) -> Rope:
        """Returns the cosines and sines of `positions` [1, tokens], uint32."""
        cos, sin = (self._rows(table, positions) for table in (self.cos, self.sin))
        return Rope(cos, sin, self.transformation)

    def _rows(self, table: ttnn.Tensor, positions: ttnn.Tensor) -> ttnn.Tensor:
        rows = ttnn.embedding(positions, table, layout=ttnn.TILE_LAYOUT)
        return ttnn.reshape(rows, (1, 1, positions.shape[-1], table.shape[-1]))
