"""DeepSeek's FP8: float8_e4m3fn matrices with one scale for each block of 128x128 values."""

import torch

from weights.model_config import FP8_BLOCK
from weights.sizes import ceil_div

SCALE_SUFFIX = "_scale_inv"
"""The end of the name of a weight's scales; despite the name they are multiplied by."""


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the scales of a matrix of `shape`: blocks at the bottom and right edges may be smaller."""
    return tuple(ceil_div(size, FP8_BLOCK) for size in shape)


def dequantise(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns a float32 matrix: each value of `weight` [rows, columns] times the scale of its block.

    `scales` is float32 of `scale_shape(weight.shape)`. Every product is rounded once, to float32. Takes no more memory
    than the result and one row of blocks.
    """
    rows, columns = weight.shape
    values = torch.empty(rows, columns, dtype=torch.float32)
    for block, scale_row in enumerate(scales):
        span = slice(block * FP8_BLOCK, (block + 1) * FP8_BLOCK)
        values[span] = weight[span]
        values[span] *= scale_row.repeat_interleave(FP8_BLOCK)[:columns]
    return values
