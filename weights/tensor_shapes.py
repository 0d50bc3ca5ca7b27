"""Names and shapes of the tensors of a DeepSeek-V3 checkpoint, as deepseek-ai publishes them."""

from collections.abc import Iterator

from weights.model_config import ModelConfig

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"


def layer_prefix(layer: int) -> str:
    """Returns the beginning of the names of a decoder layer's tensors."""
    return f"model.layers.{layer}."


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Returns the shapes of all tensors of the model by name; matrices are [out, in], as torch.nn.Linear has them.

    The multi-token-prediction layer that follows the last decoder layer in some checkpoints is not among them.
    """
    hidden = config.hidden_size
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes.update((layer_prefix(layer) + name, shape) for name, shape in _layer(config, layer))
    shapes[NORM] = (hidden,)
    shapes[HEAD] = (config.vocab_size, hidden)
    return shapes


def _layer(config: ModelConfig, layer: int) -> Iterator[tuple[str, Shape]]:
    yield "input_layernorm.weight", (config.hidden_size,)
    yield from _attention(config)
    yield "post_attention_layernorm.weight", (config.hidden_size,)
    if not config.is_moe(layer):
        yield from _mlp("mlp.", config.hidden_size, config.intermediate_size)
        return
    experts, inner = config.n_routed_experts, config.moe_intermediate_size
    yield "mlp.gate.weight", (experts, config.hidden_size)
    yield "mlp.gate.e_score_correction_bias", (experts,)
    for expert in range(experts):
        yield from _mlp(f"mlp.experts.{expert}.", config.hidden_size, inner)
    yield from _mlp("mlp.shared_experts.", config.hidden_size, inner * config.n_shared_experts)


def _attention(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    yield "self_attn.q_a_proj.weight", (config.q_lora_rank, hidden)
    yield "self_attn.q_a_layernorm.weight", (config.q_lora_rank,)
    yield "self_attn.q_b_proj.weight", (heads * config.qk_head_dim, config.q_lora_rank)
    yield "self_attn.kv_a_proj_with_mqa.weight", (config.kv_dim, hidden)
    yield "self_attn.kv_a_layernorm.weight", (config.kv_lora_rank,)
    yield "self_attn.kv_b_proj.weight", (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)
    yield "self_attn.o_proj.weight", (hidden, heads * config.v_head_dim)


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    yield prefix + "gate_proj.weight", (inner, hidden)
    yield prefix + "up_proj.weight", (inner, hidden)
    yield prefix + "down_proj.weight", (hidden, inner)
