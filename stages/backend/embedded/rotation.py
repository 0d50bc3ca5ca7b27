"""Rotary embeddings: pairs of neighbours of a vector, turned by the angles of its position."""

import functools

import torch

from stages.backend.embedded.chips import on_chips, refuse, unary
from stages.backend.embedded.dtype import TILE_LAYOUT, TILE_SIZE, bfloat16
from stages.backend.embedded.memory import MemoryConfig
from stages.backend.embedded.program_configs import WormholeComputeKernelConfig
from stages.backend.embedded.tensor import Tensor


def rotary_embedding_llama(
    input_tensor: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    trans_mat: Tensor,
    *,
    is_decode_mode: bool = False,
    memory_config: MemoryConfig | None = None,
    compute_kernel_config: WormholeComputeKernelConfig | None = None,
) -> Tensor:
    """Rotates each pair of neighbours of x [1, heads, T, d] by its angle: x * cos + turned(x) * sin.

    turned(x)[2i] = -x[2i + 1] and turned(x)[2i + 1] = x[2i], which a chip computes with `trans_mat` [1, 1, 32, 32].
    cos and sin are [1, 1, T, d]. Raises DeviceError for other shapes, other dtypes than bfloat16, and ROW_MAJOR layout.
    """
    x = input_tensor
    for operand in (x, cos_cache, sin_cache, trans_mat):
        if operand.dtype is not bfloat16 or operand.layout is not TILE_LAYOUT:
            refuse("rotary_embedding_llama", "its operands must be bfloat16 in TILE layout", x, operand)
    shape = x.shape
    if is_decode_mode:
        refuse("rotary_embedding_llama", "the decode mode is not supported; put users on dimension 2", x)
    if len(shape) != 4 or shape[0] != 1 or shape[3] % 2:
        refuse("rotary_embedding_llama", "x must be [1, heads, T, d] with d even", x)
    if cos_cache.shape != (1, 1, *shape[2:]) or sin_cache.shape != cos_cache.shape:
        refuse("rotary_embedding_llama", "cos and sin must be [1, 1, T, d] with x's T and d", x, cos_cache, sin_cache)
    if trans_mat.shape[-2:] != (TILE_SIZE, TILE_SIZE):
        refuse("rotary_embedding_llama", "trans_mat must be one tile", x, trans_mat)
    signed_sin = sin_cache.remember("signed", lambda: unary("rotary_embedding_llama", _signed, sin_cache))
    neighbours = _neighbours(shape[3])

    def rotate(a: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(a * cos, a.index_select(3, neighbours), sin)

    shards = on_chips("rotary_embedding_llama", rotate, x, cos_cache, signed_sin)
    return Tensor(shards, x.dtype, x.layout, x.mesh)


def _signed(sin: torch.Tensor) -> torch.Tensor:
    """`sin` with the signs of turned(x), so that x's neighbours need no change of sign."""
    signed = sin.clone()
    signed[..., 0::2].neg_()
    return signed


@functools.cache
def _neighbours(width: int) -> torch.Tensor:
    """The index of the other element of each pair: 1, 0, 3, 2, ..."""
    return torch.arange(width) ^ 1
