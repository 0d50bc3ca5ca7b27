"""Rotary positions against transformers' tables."""

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from stages.models.deepseek_v3.rope import cos_sin, pair_swap
from tests.support.checkpoints import config_keys
from tests.support.stage_driver import relative_error
from weights.model_config import ModelConfig

YARN: dict[str, Any] = config_keys()["rope_scaling"]
POSITIONS = torch.tensor([0, 1, 2, 31, 100, 4095, 4096, 20000, 163839])


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"rope_scaling": None},
        {"qk_rope_head_dim": 64},
        {"qk_rope_head_dim": 16, "rope_theta": 500000},
        {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}},
        {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0}},
        {"rope_scaling": {**YARN, "factor": 4, "original_max_position_embeddings": 64}},
        {"rope_scaling": {**YARN, "factor": 1}},
        {"rope_scaling": {**YARN, "beta_fast": 4, "beta_slow": 4}},
        # Contexts so short, or so long, that the correction range leaves the pairs there are.
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 8}},
        {"rope_scaling": {**YARN, "original_max_position_embeddings": 10**9}},
    ],
)
def test_tables_are_those_of_transformers(overrides: dict[str, Any]) -> None:
    keys = config_keys({"max_position_embeddings": 163840, **overrides})
    cos, sin = cos_sin(ModelConfig.from_dict(keys, source="test"), POSITIONS)
    rotary = DeepseekV3RotaryEmbedding(DeepseekV3Config.from_dict(keys))
    expected = rotary(torch.zeros(1, dtype=torch.float32), POSITIONS[None])
    for table, half_twice in zip((cos, sin), expected, strict=True):
        pairs = half_twice[0, :, : table.shape[-1] // 2].repeat_interleave(2, dim=-1)
        assert torch.equal(table, pairs) or relative_error(table, pairs) < 1e-6


def test_pair_swap_takes_a_b_to_minus_b_a() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert (x @ pair_swap(4)[0, 0]).tolist() == [-2.0, 1.0, -4.0, 3.0]
