"""What chips hold of a DeepSeek-V3 model: the shape, dtype and sharding of weights, and the shapes of a layer's state.

Keys of a `WeightSpecs` are those of a module's WeightConfig. Shapes are of the whole mesh unless they say otherwise.
"""

from stages.models.architecture import WeightSpec, WeightSpecs
from stages.options import CacheOptions
from stages.tensor_dtypes import DEFAULT_DTYPES, TILE, WeightDtypes
from weights.model_config import ModelConfig
from weights.sizes import round_up

INPUTS = 2
OUTPUTS = 3
"""Dimensions of a matrix [1, 1, inputs, outputs]."""
HEADS = 1
EXPERTS = 1


def norm_weights(width: int, *, is_sharded: bool) -> WeightSpec:
    """A norm's gains, as [1, 1, 1, width] in tiles: the only form that fits L1 at 7168 values."""
    return WeightSpec("weight", (1, 1, 1, width), "bfloat16", (None, OUTPUTS if is_sharded else None))


def embedding_weights(config: ModelConfig, dtypes: WeightDtypes = DEFAULT_DTYPES) -> dict[str, WeightSpec]:
    """The table of hidden states; each column holds its part of their width."""
    shape = (config.vocab_size, config.hidden_size)
    return {"embedding": WeightSpec("weight", shape, dtypes.embedding, (None, 1), is_tiled=False)}


def head_weights(config: ModelConfig, columns: int, dtypes: WeightDtypes = DEFAULT_DTYPES) -> WeightSpecs:
    """The final norm and the head."""
    return {"norm": hidden_norm_weights(config), "linear": head_projection(config, columns, dtypes)}


def head_projection(config: ModelConfig, columns: int, dtypes: WeightDtypes = DEFAULT_DTYPES) -> WeightSpec:
    """The head, its vocabulary shared out over the columns."""
    shape = (1, 1, config.hidden_size, padded_vocabulary(config, columns))
    return WeightSpec("input_tensor_b", shape, dtypes.head, (None, OUTPUTS))


def padded_vocabulary(config: ModelConfig, columns: int) -> int:
    """The tokens of the head, padded to the same whole tiles for every column; not padded on one chip."""
    return config.vocab_size if columns == 1 else round_up(config.vocab_size, columns * TILE)


def layer_weights(config: ModelConfig, layer: int, dtypes: WeightDtypes = DEFAULT_DTYPES) -> WeightSpecs:
    """A decoder layer, dense or with experts."""
    dense = mlp_weights(config.hidden_size, config.intermediate_size, dtypes)
    return {
        "input_layernorm": hidden_norm_weights(config),
        "self_attn": attention_weights(config, dtypes),
        "post_attention_layernorm": hidden_norm_weights(config),
        "mlp": moe_weights(config, dtypes) if config.is_moe(layer) else dense,
    }


def draft_weights(config: ModelConfig, dtypes: WeightDtypes = DEFAULT_DTYPES) -> WeightSpecs:
    """The multi-token-prediction layer, a decoder layer that follows the others behind a projection of its own."""
    return {
        "enorm": hidden_norm_weights(config),
        "hnorm": hidden_norm_weights(config),
        "eh_proj": draft_projection(config, dtypes),
        "block": layer_weights(config, config.num_hidden_layers, dtypes),
        "norm": hidden_norm_weights(config),
    }


def draft_projection(config: ModelConfig, dtypes: WeightDtypes = DEFAULT_DTYPES) -> WeightSpec:
    """The projection of an embedding beside a hidden state; of its rows a column has those of its values of both."""
    shape = (1, 1, 2 * config.hidden_size, config.hidden_size)
    return WeightSpec("input_tensor_b", shape, dtypes.attention, (None, INPUTS))


def hidden_norm_weights(config: ModelConfig) -> WeightSpecs:
    """A norm of hidden states, which the columns share."""
    return {"norm": norm_weights(config.hidden_size, is_sharded=True)}


def attention_weights(config: ModelConfig, dtypes: WeightDtypes = DEFAULT_DTYPES) -> dict[str, WeightSpec]:
    """Projections, the down-projections fused to one and the up-projections absorbed, and the norms between them."""
    heads, latent = config.num_attention_heads, config.kv_lora_rank

    def linear(shape: tuple[int, int, int], dim: int) -> WeightSpec:
        return WeightSpec("input_tensor_b", (1, *shape), dtypes.attention, (None, dim))

    return {
        "wq_kv_a": linear((1, config.hidden_size, config.q_lora_rank + config.kv_dim), INPUTS),
        "q_norm": norm_weights(config.q_lora_rank, is_sharded=False),
        "kv_norm": norm_weights(latent, is_sharded=False),
        "wq_b": linear((1, config.q_lora_rank, heads * config.qk_head_dim), OUTPUTS),
        "wkv_b1": linear((heads, config.qk_nope_head_dim, latent), HEADS),
        "wkv_b2": linear((heads, latent, config.v_head_dim), HEADS),
        "wo": linear((1, heads * config.v_head_dim, config.hidden_size), INPUTS),
    }


def mlp_weights(hidden: int, inner: int, dtypes: WeightDtypes = DEFAULT_DTYPES) -> dict[str, WeightSpec]:
    """A feed-forward network, its inner width shared out over the columns: w1 gates, w3 goes up, w2 comes down."""
    up = WeightSpec("input_tensor_b", (1, 1, hidden, inner), dtypes.gate_up, (None, OUTPUTS))
    down = WeightSpec("input_tensor_b", (1, 1, inner, hidden), dtypes.down, (None, INPUTS))
    return {"w1": up, "w3": up, "w2": down}


def moe_weights(config: ModelConfig, dtypes: WeightDtypes = DEFAULT_DTYPES) -> WeightSpecs:
    """The router, the routed experts and the shared ones."""
    return {
        **router_weights(config, dtypes),
        "experts": expert_weights(config, dtypes),
        "shared_experts": mlp_weights(
            config.hidden_size, config.moe_intermediate_size * config.n_shared_experts, dtypes
        ),
    }


def router_weights(config: ModelConfig, dtypes: WeightDtypes = DEFAULT_DTYPES) -> dict[str, WeightSpec]:
    """The router, whole on every chip."""
    experts = config.n_routed_experts
    return {
        "gate": WeightSpec("input_tensor_b", (1, 1, config.hidden_size, experts), dtypes.router),
        "route": WeightSpec("bias", (1, 1, 1, experts), dtypes.router),
    }


def expert_weights(config: ModelConfig, dtypes: WeightDtypes = DEFAULT_DTYPES) -> dict[str, WeightSpec]:
    """The routed experts, stacked and spread over all chips."""
    hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    up, down = (1, experts, hidden, inner), (1, experts, inner, hidden)
    return {
        "w1": WeightSpec("w1", up, dtypes.gate_up, all_chips=EXPERTS),
        "w3": WeightSpec("w3", up, dtypes.gate_up, all_chips=EXPERTS),
        "w2": WeightSpec("w2", down, dtypes.down, all_chips=EXPERTS),
    }


def selection(config: ModelConfig) -> WeightSpec:
    """The state of a mixture: the identity, of which each chip has the columns of its own experts."""
    experts = config.n_routed_experts
    return WeightSpec("select", (1, 1, experts, experts), "bfloat16", all_chips=OUTPUTS)


def kv_cache_shape(config: ModelConfig, cache: CacheOptions) -> tuple[int, ...]:
    """The shape of a layer's KV cache on each chip, for the pool of its own users: [blocks + 1, 1, block_size, kv_dim].

    A token is its normalised latent followed by its rotated key. The last block is scratch: what users that only pad a
    batch write goes there.
    """
    return (cache.blocks + 1, 1, cache.block_size, config.kv_dim)


def routed_expert_weights(config: ModelConfig, dtypes: WeightDtypes = DEFAULT_DTYPES) -> WeightSpecs:
    """The part of `layer_weights` of which a token needs only the experts that it chose."""
    return {"mlp": {"experts": expert_weights(config, dtypes)}}
