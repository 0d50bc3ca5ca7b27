"""Rows of a table."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual name

from stages.backend.embedded.chips import on_chips, refuse
from stages.backend.embedded.dtype import BLOCK_FLOATS, DataType, Layout, bfloat16, uint32
from stages.backend.embedded.eltwise import typecast
from stages.backend.embedded.memory import MemoryConfig
from stages.backend.embedded.tensor import Tensor


def embedding(
    input_tensor: Tensor,
    weight: Tensor,
    *,
    layout: Layout | None = None,
    dtype: DataType | None = None,
    memory_config: MemoryConfig | None = None,
) -> Tensor:
    """Rows of a bfloat16 `weight` [V, D] or [1, 1, V, D] for uint32 ids [B, T] or [B, 1, 1, T]: [B, T, D].

    In the table's layout unless `layout` is said; rows of a table in block floats are bfloat16. Raises DeviceError for
    ids of another dtype or outside the table: a chip takes bfloat16 ids and rounds them.
    """
    ids = input_tensor
    if ids.dtype is not uint32:
        refuse("embedding", f"ids must be uint32, not {ids.dtype.name}", ids, weight)
    shape = ids.shape
    if len(shape) < 2 or any(size != 1 for size in shape[1:-1]):
        refuse("embedding", "ids must be [B, T] or [B, 1, 1, T]", ids, weight)
    table_shape = weight.shape
    if (weight.dtype is not bfloat16 and weight.dtype not in BLOCK_FLOATS) or table_shape[:-2].numel() != 1:
        refuse("embedding", f"the table must be one of bfloat16, not {weight.dtype.name}", ids, weight)

    def look_up(chosen: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return F.embedding(chosen.view(shape[0], shape[-1]), table.view(-1, table.shape[-1]))

    output = Tensor(on_chips("embedding", look_up, ids, weight), bfloat16, layout or weight.layout, weight.mesh)
    return output if dtype is None else typecast(output, dtype)
