"""Rotary positions with YaRN: the angles of DeepSeek-V3's family."""

import math

import torch

from stages.backend import ttnn
from stages.models.rope import RopeTables
from weights.model_config import ModelConfig, Yarn, yarn_mscale

TRANSFORMATION_SIZE = 32
"""Edge of the matrix with which a chip swaps the values of a pair: one tile."""


def rope_tables(config: ModelConfig, mesh_device: ttnn.MeshDevice, positions: int) -> RopeTables:
    """Makes the tables for positions 0 .. `positions` - 1."""
    cos, sin = cos_sin(config, torch.arange(positions))
    return RopeTables.on_mesh(cos, sin, pair_swap(TRANSFORMATION_SIZE), mesh_device)


def cos_sin(config: ModelConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns float32 [positions, rope width], each angle twice: DeepSeek rotates pairs of neighbouring values.

    Under YaRN both are scaled by mscale / mscale_all_dim (modeling_deepseek.py, DeepseekV3YarnRotaryEmbedding).
    """
    angles = torch.outer(positions.to(torch.float32), inverse_frequencies(config))
    scale = 1.0
    if config.yarn is not None:
        yarn = config.yarn
        scale = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    angles = angles.repeat_interleave(2, dim=-1)
    return angles.cos() * scale, angles.sin() * scale


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Returns float32 [rope width / 2]: theta^(-2i / width), interpolated under YaRN (arXiv:2309.00071, 3.2)."""
    width = config.qk_rope_head_dim
    periods = config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    if config.yarn is None:
        return 1.0 / periods
    low, high = correction_range(config.yarn, width, config.rope_theta)
    kept = 1 - ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return 1.0 / (config.yarn.factor * periods) * (1 - kept) + 1.0 / periods * kept


def correction_range(yarn: Yarn, width: int, theta: float) -> tuple[float, float]:
    """Returns the pairs between which YaRN goes from extrapolation to interpolation, within 0 .. `width` - 1.

    The pair that turns r times over the original context is width * ln(context / (2 pi r)) / (2 ln theta)
    (modeling_deepseek.py, yarn_find_correction_range). An empty range is widened by 0.001 against division by 0.
    """

    def pair(rotations: float) -> float:
        context = yarn.original_max_position_embeddings
        return width * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(yarn.beta_fast)), 0)
    high = min(math.ceil(pair(yarn.beta_slow)), width - 1)
    return low, high + 0.001 if low == high else high


def pair_swap(size: int) -> torch.Tensor:
    """Returns a matrix [1, 1, size, size]: x @ pair_swap takes each pair (a, b) to (-b, a)."""
    matrix = torch.zeros(1, 1, size, size)
    even = torch.arange(0, size, 2)
    matrix[..., even, even + 1] = 1
    matrix[..., even + 1, even] = -1
    return matrix
