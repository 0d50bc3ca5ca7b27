"""Matrices as DeepSeek's FP8 checkpoints store them."""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's usual name

from weights.fp8 import scale_shape
from weights.model_config import FP8_BLOCK

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [rows, columns] as float8_e4m3fn, and the float32 scales by which its blocks are multiplied again.

    The largest value of a block becomes FP8's largest; no block may be all zeros.
    """
    rows, columns = weight.shape
    down, across = scale_shape((rows, columns))
    padded = F.pad(weight.float(), (0, across * FP8_BLOCK - columns, 0, down * FP8_BLOCK - rows))
    blocks = padded.view(down, FP8_BLOCK, across, FP8_BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)) / FP8_MAX
    values = (blocks / scales[:, None, :, None]).view(padded.shape)[:rows, :columns]
    return values.to(torch.float8_e4m3fn).contiguous(), scales
