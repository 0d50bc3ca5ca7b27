"""The family of DeepSeek-V3, R1 and Kimi K2."""

from typing import TYPE_CHECKING

from stages.models.architecture import Architecture, Launches, OpCounts
from stages.models.deepseek_v3.weight_specs import (
    draft_weights,
    embedding_weights,
    head_weights,
    kv_cache_shape,
    layer_weights,
    routed_expert_weights,
    selection,
)
from stages.tensor_dtypes import TILE
from weights.model_config import ModelConfig

if TYPE_CHECKING:
    from stages.models.module import Modules


OPS = OpCounts(
    norm=Launches(3, 3),
    attention=Launches(19, 25),
    mlp=Launches(2, 2),
    mixture=Launches(11, 17),
    residual=Launches(2, 2),
    enter=Launches(3, 3),
    # Two of them select the tokens that need logits.
    head=Launches(4, 4),
    draft=Launches(4, 4),
    joined_tokens=TILE,
    joined=3,
    spread=2,
    cut=2,
    rows=2,
)
"""Counted on a mock Galaxy (tests/galaxy/test_launches.py)."""


def layer_cost(config: ModelConfig, layer: int) -> int:
    """The number of weights of a decoder layer that the decode of one token reads."""
    heads = config.num_attention_heads
    attention = (
        config.hidden_size * (config.q_lora_rank + config.kv_dim)
        + config.q_lora_rank * heads * config.qk_head_dim
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * config.hidden_size
    )
    if not config.is_moe(layer):
        return attention + 3 * config.hidden_size * config.intermediate_size
    experts = config.num_experts_per_tok + config.n_shared_experts
    router = config.hidden_size * config.n_routed_experts
    return attention + router + 3 * config.hidden_size * config.moe_intermediate_size * experts


def draft_cost(config: ModelConfig) -> int:
    """The number of weights that a pass of the multi-token-prediction layer reads for one token, with the head."""
    joining = 2 * config.hidden_size * config.hidden_size
    return layer_cost(config, config.num_hidden_layers) + joining + config.vocab_size * config.hidden_size


def _load_modules() -> "Modules":
    # Here and not above: plans need the rest of the family without torch.
    from stages.models.deepseek_v3.modules import MODULES  # noqa: PLC0415

    return MODULES


DEEPSEEK_V3 = Architecture(
    name="DeepseekV3ForCausalLM",
    embedding_weights=embedding_weights,
    layer_weights=layer_weights,
    routed_expert_weights=routed_expert_weights,
    head_weights=head_weights,
    draft_weights=draft_weights,
    selection=selection,
    kv_cache_shape=kv_cache_shape,
    rope_width=lambda config: config.qk_rope_head_dim,
    layer_cost=layer_cost,
    draft_cost=draft_cost,
    ops=OPS,
    load_modules=_load_modules,
)
