"""Weight matrices as a CPU multiplies fastest by them."""

import mmap
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual name

from stages.backend.embedded.processor import HAS_FBGEMM, HAS_ONEDNN, MULTIPLIES_BFLOAT16, WIDE_FROM_ROWS
from stages.backend.embedded.trace import atomic

PACKED_FROM = 1 << 18
"""Elements from which a packed matrix is faster, whatever the number of rows: under it, packing's overhead shows."""

WIDENED_FROM_ROWS = 8
"""Rows from which a product by a small bfloat16 matrix takes longer than widening the matrix for it."""

Product = Callable[[torch.Tensor], torch.Tensor]


class Matrix:
    """One weight [N, K], for products x [..., K] -> [..., N].

    A large one is packed at its first product, for a second copy in memory. The plain one stays where it was, as a
    rule a mapped file whose pages can be dropped.
    """

    __slots__ = ("_plain", "_product")

    def __init__(self, plain: torch.Tensor) -> None:
        self._plain = plain
        self._product: Product | None = None

    @atomic
    def times(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] times this: [..., N]; in float32 where either of the two is."""
        if x.dtype != self._plain.dtype:
            return F.linear(x.float(), self._plain.float())
        if self._product is None:
            self._product = _fastest(self._plain)
        return self._product(x)


def _fastest(plain: torch.Tensor) -> Product:
    """The product by `plain`, in its dtype."""
    is_widened = plain.dtype == torch.bfloat16 and not MULTIPLIES_BFLOAT16
    if plain.numel() < PACKED_FROM:
        return _widening(plain) if is_widened else _by_plain(plain)
    if is_widened:
        return _by_halves(plain) if HAS_FBGEMM else _widening(plain)
    if not HAS_ONEDNN:
        return _by_plain(plain)
    return _wide_for_many(_by_blocks(plain), plain) if plain.dtype == torch.bfloat16 else _by_blocks(plain)


def _by_plain(plain: torch.Tensor) -> Product:
    return lambda x: F.linear(x, plain)


def _by_blocks(plain: torch.Tensor) -> Product:
    """By oneDNN's blocked layout: 1.2 to 3 times as fast as the plain one, with the same values."""
    packed = torch.ops.mkldnn._reorder_linear_weight(plain.contiguous())

    def times(x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        return product

    return times


def _by_halves(plain: torch.Tensor) -> Product:
    """By FBGEMM's packed float16: 2 to 20 times as fast as plain bfloat16, summed up in float32.

    float16 holds every bfloat16 exactly from 2^-17 to 65504; less is rounded to a multiple of 2^-24, which changes a
    sum by less than float32 does. A matrix with more in it is widened instead.
    """
    if float(plain.abs().max()) > torch.finfo(torch.float16).max:
        return _widening(plain)
    packed = _packed_halves(plain)

    def times(x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), packed)
        return product.to(x.dtype)

    return times


def _packed_halves(plain: torch.Tensor) -> Any:
    """FBGEMM's packed float16 of a matrix.

    The float32 that it is made from lies outside of the heap: there it would leave holes between packed matrices, half
    as large as these are together.
    """
    pages = mmap.mmap(-1, plain.numel() * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    wide = torch.frombuffer(pages, dtype=torch.float32).view(plain.shape)
    return torch.ops.quantized.linear_prepack_fp16(wide.copy_(plain), None)


def _wide_for_many(few: Product, plain: torch.Tensor) -> Product:
    """By `few`, unless a bfloat16 matrix is faster widened for so many rows."""
    many = _widening(plain)
    return lambda x: few(x) if x.numel() < WIDE_FROM_ROWS * x.shape[-1] else many(x)


def _widening(plain: torch.Tensor) -> Product:
    def times(x: torch.Tensor) -> torch.Tensor:
        if x.numel() < WIDENED_FROM_ROWS * x.shape[-1]:
            return F.linear(x, plain)
        return F.linear(x.float(), plain.float()).to(x.dtype)

    return times
