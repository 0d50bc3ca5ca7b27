"""Deployments of R1 and of random models for tests of plans."""

from typing import Any

from hypothesis import strategies as st

from stages.capacity.deployment import Deployment
from stages.tensor_dtypes import CHOICES, WeightDtypes
from tests.support.checkpoints import config_keys
from weights.model_config import ModelConfig
from weights.presets import preset_config

R1 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
}


def r1_config() -> ModelConfig:
    """The configuration of full R1."""
    return preset_config("r1")


def deployment(stages: int, rows_per_stage: int, **changes: Any) -> Deployment:
    """A deployment with 32 users a row and 4096 tokens a request, except for `changes`."""
    given: dict[str, Any] = {"users_per_row": 32, "max_model_len": 4096, "block_size": 32, "prefill_chunk": 256}
    return Deployment(stages=stages, rows_per_stage=rows_per_stage, **{**given, **changes})


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Random DeepSeek-V3 models that up to 4 rows can share."""
    heads = 128 * draw(st.integers(1, 2))
    layers = draw(st.integers(2, 12))
    sizes = {
        "vocab_size": draw(st.integers(100, 200000)),
        "hidden_size": 256 * draw(st.integers(1, 32)),
        "intermediate_size": 256 * draw(st.integers(1, 80)),
        "moe_intermediate_size": 64 * draw(st.integers(1, 40)),
        "num_hidden_layers": layers,
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": 32 * draw(st.integers(1, 48)),
        "kv_lora_rank": 32 * draw(st.integers(1, 16)),
        "n_routed_experts": 32 * draw(st.integers(1, 8)),
    }
    return ModelConfig.from_dict(config_keys(sizes), source="a random model")


def dtypes() -> st.SearchStrategy[WeightDtypes]:
    """All combinations of the dtypes that the kinds of weights may have."""
    return st.builds(WeightDtypes, **{kind: st.sampled_from(allowed) for kind, allowed in CHOICES.items()})


@st.composite
def deployments(draw: st.DrawFn, layers: int) -> Deployment:
    """Draws the deployment of a model of so many layers, on stages of 1, 2 or 4 rows."""
    return deployment(
        draw(st.integers(1, layers)),
        draw(st.sampled_from([1, 2, 4])),
        users_per_row=8 * draw(st.integers(1, 16)),
        max_model_len=draw(st.integers(1, 20000)),
        block_size=32 * draw(st.integers(1, 4)),
        prefill_chunk=draw(st.integers(1, 2048)),
        dtypes=draw(dtypes()),
    )
