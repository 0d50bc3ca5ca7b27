"""What chips hold of a DeepSeek-V3 model: the shape, dtype and sharding of weights, and the shapes of a layer's state.

Keys of a `WeightSpecs` are those of a module's WeightConfig. Shapes are of the whole mesh unless they say otherwise.
"""

from stages.models.architecture import WeightSpec, WeightSpecs
from stages.options import CacheOptions
from stages.tensor_dtypes import DEFAULT_DTYPES, TILE, WeightDtypes
from stages.wormhole import GALAXY_COLUMNS
from weights.model_config import ModelConfig
from weights.sizes import round_up

INPUTS = 2
OUTPUTS = 3
"""Dimensions of a matrix [1, 1, inputs, outputs]."""
HEADS = 1
EXPERTS = 1


def norm_weights(width: int) -> WeightSpec:
    """A norm of one chip's values: gains [1, 1, 1, width] in tiles, the only form that fits L1 at any width."""
    return WeightSpec("weight", (1, 1, 1, width), "bfloat16")


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


def hidden_norm_weights(config: ModelConfig) -> dict[str, WeightSpec]:
    """A norm of hidden states, which the columns share: rows of a tile's width, as norms with a residual take them."""
    width = config.hidden_size
    if width % (TILE * GALAXY_COLUMNS):
        return {"norm": norm_weights(width)._replace(dims=(None, OUTPUTS))}
    shape = (1, 1, width // TILE, TILE)
    return {"norm": WeightSpec("weight", shape, "bfloat16", (None, INPUTS), is_tiled=False)}


def attention_weights(config: ModelConfig, dtypes: WeightDtypes = DEFAULT_DTYPES) -> dict[str, WeightSpec]:
    """Projections, the down-projections fused to one and the up-projections absorbed, and the norms between them.

    Every column has all of the down-projection, 16 MB of R1's: what it gathers to multiply is a seventh of the work of
    adding up partial products, and the latents of tokens need not be exchanged at all.
    """
    heads, latent = config.num_attention_heads, config.kv_lora_rank

    def linear(shape: tuple[int, int, int], dim: int | None) -> WeightSpec:
        return WeightSpec("input_tensor_b", (1, *shape), dtypes.attention, (None, dim))

    return {
        "wq_kv_a": linear((1, config.hidden_size, config.q_lora_rank + config.kv_dim), None),
        "q_norm": norm_weights(config.q_lora_rank),
        "kv_norm": norm_weights(latent),
        "wq_b": linear((1, config.q_lora_rank, heads * config.qk_head_dim), OUTPUTS),
        "wkv_b1": linear((heads, config.qk_nope_head_dim, latent), HEADS),
        "wkv_b2": linear((heads, latent, config.v_head_dim), HEADS),
        "wo": linear((1, heads * config.v_head_dim, config.hidden_size), INPUTS),
    }


def mlp_weights(
    hidden: int, inner: int, dtypes: WeightDtypes = DEFAULT_DTYPES, *, down: int = OUTPUTS
) -> dict[str, WeightSpec]:
    """A feed-forward network, its inner width shared out over the columns: w1 gates, w3 goes up, w2 comes down.

    Where columns share whole tiles, w1 and w3 are one, w13, as pairs of tiles. `down` is the dimension along which the
    columns share w2: OUTPUTS for columns that gather its inputs, INPUTS for partial sums.
    """
    come_down = WeightSpec("input_tensor_b", (1, 1, inner, hidden), dtypes.down, (None, down))
    if shares_tiles(inner):
        return {"w13": _upwards(hidden, 2 * inner, dtypes), "w2": come_down}
    up = _upwards(hidden, inner, dtypes)
    return {"w1": up, "w3": up, "w2": come_down}


def shares_tiles(inner: int) -> bool:
    """Whether the columns of a Galaxy share `inner` values in whole tiles."""
    return inner % (TILE * GALAXY_COLUMNS) == 0


def _upwards(hidden: int, width: int, dtypes: WeightDtypes) -> WeightSpec:
    return WeightSpec("input_tensor_b", (1, 1, hidden, width), dtypes.gate_up, (None, OUTPUTS))


def moe_weights(config: ModelConfig, dtypes: WeightDtypes = DEFAULT_DTYPES) -> WeightSpecs:
    """The router, the routed experts and the shared ones, as chips have them."""
    if stacks_experts(config):
        return {**router_weights(config, dtypes), "experts": stacked_expert_weights(config, dtypes)}
    return {
        **router_weights(config, dtypes),
        "experts": expert_weights(config, dtypes),
        "shared_experts": mlp_weights(
            config.hidden_size, config.moe_intermediate_size * config.n_shared_experts, dtypes, down=INPUTS
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


def stacks_experts(config: ModelConfig) -> bool:
    """Whether chips run their experts as one network: where each and the columns' parts of shared ones are tiles."""
    return config.moe_intermediate_size % TILE == 0 and shares_tiles(shared_width(config))


def shared_width(config: ModelConfig) -> int:
    """The inner width of all shared experts together."""
    return config.moe_intermediate_size * config.n_shared_experts


def stacked_expert_weights(config: ModelConfig, dtypes: WeightDtypes = DEFAULT_DTYPES) -> dict[str, WeightSpec]:
    """All experts of a chip as one feed-forward network, and behind them its column's part of the shared ones.

    w13 has pairs of tiles of columns, a gate's and one that goes up; w2 has rows in the same order.
    """
    hidden, inner = config.hidden_size, config.n_routed_experts * config.moe_intermediate_size
    beside = shared_width(config)
    return {
        "w13": WeightSpec("w13", (1, 1, hidden, 2 * inner), dtypes.gate_up, all_chips=OUTPUTS, beside=2 * beside),
        "w2": WeightSpec("w2", (1, 1, inner, hidden), dtypes.down, all_chips=INPUTS, beside=beside),
    }


def selection(config: ModelConfig) -> WeightSpec:
    """The state of a mixture, which takes weights by expert to those of a chip's own.

    The identity, of which each chip has the columns of its own experts; for stacked ones each column as often as the
    expert is wide, and a row more, of a tile, for the weight of shared ones. Its zeros and ones are exact in 4 bits.
    """
    experts = config.n_routed_experts
    if not stacks_experts(config):
        return WeightSpec("select", (1, 1, experts, experts), "bfloat16", all_chips=OUTPUTS)
    shape = (1, 1, experts + TILE, experts * config.moe_intermediate_size)
    return WeightSpec("select", shape, "bfloat4_b", all_chips=OUTPUTS, beside=shared_width(config))


def kv_cache_shape(config: ModelConfig, cache: CacheOptions) -> tuple[int, ...]:
    """The shape of a layer's KV cache on each chip, for the pool of its own users: [blocks + 1, 1, block_size, kv_dim].

    A token is its normalised latent followed by its rotated key. The last block is scratch: what users that only pad a
    batch write goes there.
    """
    return (cache.blocks + 1, 1, cache.block_size, config.kv_dim)


def routed_expert_weights(config: ModelConfig, dtypes: WeightDtypes = DEFAULT_DTYPES) -> WeightSpecs:
    """The part of `layer_weights` of which a token needs only the experts that it chose."""
    experts = stacked_expert_weights if stacks_experts(config) else expert_weights
    return {"mlp": {"experts": experts(config, dtypes)}}
