"""Matrix products, by the fastest way that this processor has for the dtype, the matrix and the number of rows."""

import mmap
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual name

from stages.backend.embedded.chips import on_chips, refuse, refuse_all_but_float_tiles, refuse_because
from stages.backend.embedded.dtype import TILE_LAYOUT, DataType, held_in
from stages.backend.embedded.memory import CoreGrid, MemoryConfig
from stages.backend.embedded.program_configs import MatmulProgramConfig, WormholeComputeKernelConfig
from stages.backend.embedded.tensor import Tensor
from stages.backend.embedded.torch_private import (
    HAS_BFLOAT16_TILES,
    HAS_ONEDNN,
    MULTIPLIES_BFLOAT16,
    blocked_product,
    pack_blocked,
)
from stages.backend.embedded.trace import atomic

HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines
"""Whether there are products by weights that are held in float16 (x86 with AVX2 and later)."""

PACKED_FROM = 1 << 19
"""Elements from which packing a matrix pays for any number of rows; below, its overhead is larger than its gain."""

WIDENED_FROM_ROWS = 8
"""Rows from which a product by a bfloat16 matrix that is not packed takes longer than widening the matrix for it."""

NARROW_FROM = 1 << 19
"""Multiplications from which a product by a small bfloat16 matrix is faster in bfloat16, where a processor has that.

A call of oneDNN takes some 20 us before it multiplies, one of MKL in float32 a tenth of that.
"""


def _wide_from_rows() -> int:
    if not MULTIPLIES_BFLOAT16:
        return 1
    return sys.maxsize if HAS_BFLOAT16_TILES else 128


WIDE_FROM_ROWS = _wide_from_rows()
"""Rows from which a product of bfloat16 takes longer than one of float32 whose operands are widened first.

Without instructions for bfloat16 it always does. AVX-512's instructions for pairs read half as much, and are faster
while reading takes most of the time; from some 100 rows on, float32 is 1.4 to 2 times as fast.
"""

Product = Callable[[torch.Tensor], torch.Tensor]
"""The product of its argument by one matrix."""


def widened(x: torch.Tensor, rows: int) -> torch.Tensor:
    """`x` in the dtype in which this processor multiplies it by `rows` rows fastest: bfloat16 or float32."""
    return x.float() if x.dtype == torch.bfloat16 and rows >= WIDE_FROM_ROWS else x


class Matrix:
    """A weight [N, K], for products x [..., K] -> [..., N].

    A large matrix is packed at its first product, and a small one of bfloat16 widened, which takes a second copy in
    memory. The plain one stays where it was, as a rule in a mapped file whose pages can be dropped.
    """

    __slots__ = ("_plain", "_product")

    def __init__(self, plain: torch.Tensor) -> None:
        self._plain = plain
        self._product: Product | None = None

    @atomic
    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies x [..., K] by the matrix: [..., N], in float32 if one of the two is."""
        if x.dtype != self._plain.dtype:
            return F.linear(x.float(), self._plain.float())
        if self._product is None:
            self._product = _fastest(self._plain)
        return self._product(x)


def _fastest(plain: torch.Tensor) -> Product:
    """The fastest product by `plain`, in its dtype."""
    is_widened = plain.dtype == torch.bfloat16 and not MULTIPLIES_BFLOAT16
    if plain.numel() < PACKED_FROM:
        return _by_small_halves(plain) if plain.dtype == torch.bfloat16 else _by_plain(plain)
    if is_widened:
        return _by_halves(plain) if HAS_FBGEMM else _widening(plain)
    if not HAS_ONEDNN:
        return _by_plain(plain)
    return _wide_for_many(_by_blocks(plain), plain) if plain.dtype == torch.bfloat16 else _by_blocks(plain)


def _by_plain(plain: torch.Tensor) -> Product:
    return lambda x: F.linear(x, plain)


def _by_small_halves(plain: torch.Tensor) -> Product:
    """A product by a small bfloat16 matrix, which is kept in float32 too."""
    wide = plain.float()

    def times(x: torch.Tensor) -> torch.Tensor:
        if MULTIPLIES_BFLOAT16 and x.numel() * len(plain) >= NARROW_FROM:
            return F.linear(x, plain)
        return F.linear(x.float(), wide).to(x.dtype)

    return times


def _by_blocks(plain: torch.Tensor) -> Product:
    """A product by oneDNN's blocked layout: 1.2 to 3 times as fast as the plain one, with the same values."""
    packed = pack_blocked(plain.contiguous())
    return lambda x: blocked_product(x, packed)


def _by_halves(plain: torch.Tensor) -> Product:
    """A product by FBGEMM's packed float16: 2 to 20 times as fast as plain bfloat16, with sums in float32.

    float16 holds every bfloat16 from 2^-17 to 65504 exactly; smaller values are rounded to a multiple of 2^-24, which
    changes a sum by less than float32 does. A matrix with larger values is widened instead.
    """
    if float(plain.abs().max()) > torch.finfo(torch.float16).max:
        return _widening(plain)
    packed = _packed_halves(plain)

    def times(x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), packed)
        return product.to(x.dtype)

    return times


def _packed_halves(plain: torch.Tensor) -> Any:
    """A matrix packed in float16 by FBGEMM.

    The float32 copy that it is made from is outside of the heap, where it would leave holes between packed matrices,
    half as large as these together."""
    pages = mmap.mmap(-1, plain.numel() * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    wide = torch.frombuffer(pages, dtype=torch.float32).view(plain.shape)
    return torch.ops.quantized.linear_prepack_fp16(wide.copy_(plain), None)


def _wide_for_many(few: Product, plain: torch.Tensor) -> Product:
    """A product by `few`, or by the widened matrix for as many rows as make that faster."""
    many = _widening(plain)
    return lambda x: few(x) if x.numel() < WIDE_FROM_ROWS * x.shape[-1] else many(x)


def _widening(plain: torch.Tensor) -> Product:
    def times(x: torch.Tensor) -> torch.Tensor:
        if x.numel() < WIDENED_FROM_ROWS * x.shape[-1]:
            return F.linear(x, plain)
        return F.linear(x.float(), plain.float()).to(x.dtype)

    return times


def linear(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor,
    *,
    memory_config: MemoryConfig | None = None,
    dtype: DataType | None = None,
    program_config: MatmulProgramConfig | None = None,
    activation: str | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    core_grid: CoreGrid | None = None,
) -> Tensor:
    """Multiplies x [..., T, K] by a weight [..., K, N], then applies `activation` ("silu" or None).

    The result is in x's dtype unless `dtype` is given, and computed in float32 if either operand is held in it. Raises
    DeviceError if K differs, or an operand is not in TILE layout or holds integers.
    """
    x, weight = input_tensor_a, input_tensor_b
    if activation is not None and activation != "silu":
        refuse("linear", f"activation {activation!r} is unknown", x, weight)
    refuse_all_but_float_tiles("linear", x, weight)
    matrices = weight.remember("matrices", lambda: _matrices(weight))
    output = _converted(_by_matrices(x, weight, matrices), dtype) if matrices else matmul(x, weight, dtype=dtype)
    if activation is None:
        return output
    return Tensor(on_chips("linear", F.silu, output), output.dtype, output.layout, output.mesh)


def matmul(
    input_tensor_a: Tensor,
    input_tensor_b: Tensor,
    *,
    memory_config: MemoryConfig | None = None,
    dtype: DataType | None = None,
    program_config: MatmulProgramConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
    core_grid: CoreGrid | None = None,
) -> Tensor:
    """Multiplies [..., T, K] by [..., K, N], whose leading dimensions are equal or 1; else as `linear` does."""
    x, y = input_tensor_a, input_tensor_b
    refuse_all_but_float_tiles("matmul", x, y)
    return _converted(Tensor(on_chips("matmul", _product, x, y), x.dtype, TILE_LAYOUT, x.mesh), dtype)


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if x.dtype != y.dtype:
        x, y = x.float(), y.float()
    held = x.dtype
    rows = x.shape[-2]
    x, y = widened(x, rows), widened(y, rows)
    if y.dim() == 4 and y.shape[0] == y.shape[1] == 1:
        return F.linear(x, y[0, 0].t()).to(held)
    return torch.matmul(x, y).to(held)


def _matrices(weight: Tensor) -> list[Matrix]:
    """One matrix for each chip; none if the weight is a batch of matrices. Shards that alias share a matrix."""
    if weight.shape[:-2].numel() != 1:
        return []
    made = {id(shard): Matrix(shard.view(shard.shape[-2:]).t()) for shard in weight.shards}
    return [made[id(shard)] for shard in weight.shards]


def _by_matrices(x: Tensor, weight: Tensor, matrices: list[Matrix]) -> Tensor:
    try:
        if len(x.shards) == 1 and x.mesh is weight.mesh:
            return Tensor([matrices[0].times(x.shards[0])], x.dtype, TILE_LAYOUT, x.mesh)
        by_shard = {id(shard): matrix for shard, matrix in zip(weight.shards, matrices, strict=True)}
        shards = on_chips("linear", lambda a, shard: by_shard[id(shard)].times(a), x, weight)
    except RuntimeError as error:
        refuse_because("linear", error, x, weight)
    return Tensor(shards, x.dtype, TILE_LAYOUT, x.mesh)


def _converted(output: Tensor, dtype: DataType | None) -> Tensor:
    """Converts to `dtype`, or to the output's own: a product with float32 is wider than its dtype."""
    if dtype is not None:
        output.dtype = dtype
    held = held_in(output.dtype)
    if output.shards[0].dtype != held:
        output.shards = on_chips("linear", lambda shard: shard.to(held), output)
    return output
