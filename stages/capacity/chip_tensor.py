"""One chip's part of a tensor, and the memory that the allocator takes for it."""

import math
from typing import Literal

import msgspec

from stages.tensor_dtypes import TILE, TILE_BYTES, VALUE_BYTES, TensorDtype
from stages.wormhole import DRAM_ALIGNMENT, DRAM_BANKS

Layout = Literal["tile", "row_major"]


class ChipTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor of `shape` on one chip, in memory that is interleaved over banks.

    Weights are named as their files below a part's directory. Row-major tensors have dtypes of whole bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: TensorDtype
    layout: Layout = "tile"

    @property
    def values(self) -> int:
        """Numbers in it, padding not counted."""
        return math.prod(self.shape)

    @property
    def page_bytes(self) -> int:
        """A page is a tile, or a row."""
        if self.layout == "tile":
            return TILE_BYTES[self.dtype]
        return _rounded_up(self.shape[-1] * VALUE_BYTES[self.dtype], DRAM_ALIGNMENT)

    @property
    def pages(self) -> int:
        """Tiles, with the last two dimensions padded to whole ones, or rows."""
        if self.layout == "row_major":
            return math.prod(self.shape[:-1])
        height, width = (-(-size // TILE) for size in self.shape[-2:])
        return math.prod(self.shape[:-2]) * height * width

    @property
    def bytes(self) -> int:
        """What its pages hold."""
        return self.pages * self.page_bytes

    def allocated(self, banks: int = DRAM_BANKS) -> int:
        """What the allocator takes: as many pages of every bank as the fullest one gets."""
        return _rounded_up(self.pages, banks) * self.page_bytes


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
