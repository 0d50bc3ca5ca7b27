"""Data types and layouts under ttnn's names, and the torch dtypes that hold them.

Floats narrower than float32 are held in one dtype for the whole process: float32 where values are compared, bfloat16
to serve. `float32` itself is always held in float32, and integers in int64, which torch takes for indices.
"""

import enum

import torch

from stages.errors import DeviceError

TILE_SIZE = 32
"""The edge of a Wormhole tile, in elements."""


class DataType(enum.Enum):
    """ttnn's data types."""

    BFLOAT16 = 0
    FLOAT32 = 1
    UINT32 = 2
    BFLOAT8_B = 3
    BFLOAT4_B = 4
    UINT8 = 5
    UINT16 = 6
    INT32 = 7


class Layout(enum.Enum):
    """ttnn's layouts; they are recorded and checked, but do not change how shards are stored."""

    ROW_MAJOR = 0
    TILE = 1


bfloat16 = DataType.BFLOAT16
float32 = DataType.FLOAT32
uint32 = DataType.UINT32
bfloat8_b = DataType.BFLOAT8_B
bfloat4_b = DataType.BFLOAT4_B
uint8 = DataType.UINT8
uint16 = DataType.UINT16
int32 = DataType.INT32
ROW_MAJOR_LAYOUT = Layout.ROW_MAJOR
TILE_LAYOUT = Layout.TILE

NARROW_FLOATS = (bfloat16, bfloat8_b, bfloat4_b)
BLOCK_FLOATS = (bfloat8_b, bfloat4_b)
"""Dtypes in which sixteen values of a tile share an exponent; they do not exist outside of tiles."""
INTEGERS = frozenset({uint8, uint16, uint32, int32})

_held: dict[DataType, torch.dtype] = {
    **dict.fromkeys(DataType, torch.int64),
    **dict.fromkeys(NARROW_FLOATS, torch.bfloat16),
    float32: torch.float32,
}


def layout_of(dtype: DataType, layout: Layout | None) -> Layout:
    """`layout`, or the dtype's usual layout if it is None. Raises DeviceError for block floats in ROW_MAJOR."""
    if dtype not in BLOCK_FLOATS:
        return layout or ROW_MAJOR_LAYOUT
    if layout is ROW_MAJOR_LAYOUT:
        raise DeviceError(f"{dtype.name} exists in TILE layout only.")
    return TILE_LAYOUT


def set_float_dtype(dtype: torch.dtype) -> None:
    """Holds every float narrower than float32 in `dtype`, torch.float32 or torch.bfloat16, from now on.

    Raises DeviceError for another dtype. Existing tensors keep theirs.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise DeviceError(f"Floats cannot be held in {dtype}: choose torch.float32 or torch.bfloat16.")
    _held.update(dict.fromkeys(NARROW_FLOATS, dtype))


def held_in(dtype: DataType) -> torch.dtype:
    """The torch dtype of the shards of a tensor of this dtype."""
    return _held[dtype]
