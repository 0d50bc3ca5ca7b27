"""What a DeepSeek-V3 model costs: the weights that a token reads, and the ops of each module's forward pass."""

from stages.models.architecture import Launches, OpCounts
from weights.model_config import ModelConfig

OPS = OpCounts(
    norm=Launches(3, 3),
    attention=Launches(32, 35),
    mlp=Launches(6, 6),
    mixture=Launches(25, 25),
    residual=Launches(2, 2),
    enter=Launches(6, 6),
    # Four of them select the tokens that need logits.
    head=Launches(6, 6),
)


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
