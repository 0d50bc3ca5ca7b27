"""Multi-head latent attention with the up-projections of keys and values absorbed into queries and outputs.

The cache keeps one latent and one rotated key for each token, shared by all heads (DeepSeek-V2, arXiv:2405.04434,
2.1). Projections are tensor parallel by heads; attention itself is parallel by users, because the cache has no heads
to share out: an all-to-all before and after attention exchanges heads for users.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import torch

from stages.backend import composite, fused, ttnn
from stages.batch import DecodeBatch, PrefillBatch, PrefillGroup
from stages.errors import PlanError
from stages.models.deepseek_v3.rms_norm import LATENT_EPSILON
from stages.models.deepseek_v3.weight_specs import attention_weights, kv_cache_shape
from stages.models.module import COLUMNS, Module, columns, matmul_kernel, share, transposed
from stages.models.rope import Rope
from stages.options import CacheOptions
from stages.run_config import (
    FLOATS,
    AllToAllConfig,
    GatheredLinearConfig,
    LinearConfig,
    MeshPartitionConfig,
    MLADecodeConfig,
    MLAPrefillConfig,
    OpConfig,
    OperatorConfig,
    ReduceScatterConfig,
    RMSNormConfig,
    RotaryConfig,
    StateDict,
    WeightConfig,
    dump_weight,
)
from stages.tensor_dtypes import DEFAULT_DTYPES, TILE, WeightDtypes
from weights.model_config import HuggingFaceConfig, ModelConfig


def convert_mla_weights(
    config: ModelConfig,
    state_dict: StateDict,
    output_path: Path,
    mesh_device: ttnn.MeshDevice,
    dtypes: WeightDtypes = DEFAULT_DTYPES,
) -> WeightConfig:
    """Writes attention's weights; `state_dict` has the names of a checkpoint's self_attn.

    Raises PlanError where the heads or the hidden size cannot be shared by the columns.
    """
    share(config.num_attention_heads, columns(mesh_device), "The number of attention heads")
    share(config.hidden_size, columns(mesh_device), "The hidden size")

    # Functions, so that one tensor is made after the other and no two are held at once.
    made: dict[str, Callable[[], torch.Tensor]] = {
        "wq_kv_a": lambda: fused_down_projection(state_dict),
        "q_norm": lambda: state_dict["q_a_layernorm.weight"][None, None, None],
        "kv_norm": lambda: state_dict["kv_a_layernorm.weight"][None, None, None],
        "wq_b": lambda: transposed(state_dict, "q_b_proj.weight"),
        "wkv_b1": lambda: key_projection(config, state_dict),
        "wkv_b2": lambda: value_projection(config, state_dict),
        "wo": lambda: transposed(state_dict, "o_proj.weight"),
    }
    return {
        operation: dump_weight(output_path, operation, spec, made[operation](), mesh_device)
        for operation, spec in attention_weights(config, dtypes).items()
    }


def fused_down_projection(state_dict: StateDict) -> torch.Tensor:
    """q_a_proj beside kv_a_proj_with_mqa, [1, 1, hidden, q_lora + kv_lora + rope]: one product."""
    both = [state_dict["q_a_proj.weight"], state_dict["kv_a_proj_with_mqa.weight"]]
    return torch.cat(both).t()[None, None]


def key_projection(config: ModelConfig, state_dict: StateDict) -> torch.Tensor:
    """The keys' part of kv_b_proj, [1, heads, nope, kv_lora]: takes a query to the space of latents."""
    return _up_projection(config, state_dict)[:, : config.qk_nope_head_dim][None]


def value_projection(config: ModelConfig, state_dict: StateDict) -> torch.Tensor:
    """The values' part of kv_b_proj, [1, heads, kv_lora, v]: takes attended latents to values."""
    return _up_projection(config, state_dict)[:, config.qk_nope_head_dim :].transpose(1, 2)[None]


def _up_projection(config: ModelConfig, state_dict: StateDict) -> torch.Tensor:
    """kv_b_proj as [heads, nope + v, kv_lora]."""
    shape = (config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank)
    return state_dict["kv_b_proj.weight"].reshape(shape)


SDPA_GRID = (8, 8)
"""Cores of a Wormhole chip that attention uses, columns and rows."""

DECODE_CHUNK = 128
PREFILL_CHUNK = 32
"""Tokens that a flash attention kernel takes at a time; larger chunks of 576 values overflow L1."""


class MLAState(TypedDict):
    """State of attention: the layer's cache on every chip."""

    mesh_device: ttnn.MeshDevice
    kv_cache: ttnn.Tensor
    semaphores: fused.Semaphores
    config: ModelConfig


class MLARunConfig(MLAState):
    """The arguments of a forward pass; `attention` is an MLAPrefillConfig or an MLADecodeConfig."""

    wq_kv_a: GatheredLinearConfig
    q_norm: RMSNormConfig
    kv_norm: RMSNormConfig
    wq_b: LinearConfig
    wkv_b1: LinearConfig
    wkv_b2: LinearConfig
    wo: LinearConfig
    rope: RotaryConfig
    users_for_heads: AllToAllConfig
    heads_for_users: AllToAllConfig
    kv_partition: MeshPartitionConfig
    attention: OpConfig
    reduce_scatter: ReduceScatterConfig


class MLA(Module[MLARunConfig]):
    """Attention over a paged latent cache."""

    @classmethod
    def convert_weights(
        cls,
        hf_config: HuggingFaceConfig | ModelConfig,
        torch_state_dict: StateDict,
        output_path: Path,
        mesh_device: ttnn.MeshDevice,
        dtypes: WeightDtypes = DEFAULT_DTYPES,
    ) -> WeightConfig:
        """Writes the projections and norms of `torch_state_dict`.

        Raises PlanError where the heads or the hidden size cannot be shared by the columns.
        """
        return convert_mla_weights(ModelConfig.from_hf(hf_config), torch_state_dict, output_path, mesh_device, dtypes)

    @classmethod
    def prefill_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs for many tokens: intermediate results go to DRAM."""
        config = ModelConfig.from_hf(hf_config)
        attention = MLAPrefillConfig(
            scale=config.softmax_scale,
            program_config=_sdpa_program(PREFILL_CHUNK, PREFILL_CHUNK),
            compute_kernel_config=matmul_kernel(),
        )
        return {
            **cls._model_config(config, ttnn.DRAM_MEMORY_CONFIG),
            "kv_partition": MeshPartitionConfig(dim=2, cluster_axis=COLUMNS),
            "attention": attention,
        }

    @classmethod
    def decode_model_config(
        cls, hf_config: HuggingFaceConfig | ModelConfig, mesh_device: ttnn.MeshDevice
    ) -> OperatorConfig:
        """Op configs for one token a user: intermediate results stay in L1."""
        config = ModelConfig.from_hf(hf_config)
        attention = MLADecodeConfig(
            head_dim_v=config.kv_lora_rank,
            scale=config.softmax_scale,
            program_config=_sdpa_program(0, DECODE_CHUNK),
            compute_kernel_config=matmul_kernel(),
        )
        return {
            **cls._model_config(config, ttnn.L1_MEMORY_CONFIG),
            # A pool's users are fewer than a tile is high, so they are split where dimension 2 is padded for each.
            "kv_partition": MeshPartitionConfig(dim=1, cluster_axis=COLUMNS),
            "attention": attention,
        }

    @classmethod
    def _model_config(cls, config: ModelConfig, memory_config: ttnn.MemoryConfig) -> OperatorConfig:
        linear = LinearConfig(memory_config=memory_config, compute_kernel_config=matmul_kernel())
        norm = RMSNormConfig(epsilon=LATENT_EPSILON, memory_config=memory_config)
        return {
            "wq_kv_a": GatheredLinearConfig(
                chunk_sizes=(config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim),
                memory_config=memory_config,
                compute_kernel_config=matmul_kernel(),
            ),
            "q_norm": norm,
            "kv_norm": norm,
            "wq_b": linear,
            "wkv_b1": linear,
            "wkv_b2": linear,
            "wo": linear,
            "rope": RotaryConfig(kv_actual_global=0, cluster_axis=COLUMNS, memory_config=memory_config),
            "users_for_heads": AllToAllConfig(in_dim=2, out_dim=1, cluster_axis=COLUMNS),
            "heads_for_users": AllToAllConfig(in_dim=1, out_dim=2, cluster_axis=COLUMNS),
            "reduce_scatter": ReduceScatterConfig(dim=3, cluster_axis=COLUMNS, memory_config=memory_config),
        }

    @classmethod
    def create_state(
        cls,
        hf_config: HuggingFaceConfig | ModelConfig,
        mesh_device: ttnn.MeshDevice,
        cache: CacheOptions,
        dtypes: WeightDtypes = DEFAULT_DTYPES,
    ) -> MLAState:
        """Returns an empty KV cache of the size that `cache` gives.

        Raises PlanError where kv_lora_rank is not a multiple of a tile's width, which attention cannot split off,
        or where heads are too few for the columns of a mesh of chips.
        """
        config = ModelConfig.from_hf(hf_config)
        heads, parts = config.num_attention_heads, columns(mesh_device)
        if parts > 1 and heads // parts % composite.HEADS_TOGETHER:
            raise PlanError(
                f"{heads} attention heads cannot be exchanged by {parts} columns of chips, which do so by "
                f"{composite.HEADS_TOGETHER}: the model runs on one chip only."
            )
        if config.kv_lora_rank % TILE:
            raise PlanError(f"kv_lora_rank is {config.kv_lora_rank}; only multiples of {TILE} can be served.")
        return {
            "mesh_device": mesh_device,
            "kv_cache": composite.zeroed(
                kv_cache_shape(config, cache), dtype=FLOATS[dtypes.kv_cache], device=mesh_device
            ),
            "semaphores": fused.semaphores(mesh_device),
            "config": config,
        }

    @classmethod
    def forward_prefill(cls, x: ttnn.Tensor, cfg: MLARunConfig, batch: PrefillBatch) -> ttnn.Tensor:
        """x [1, 1, tokens, hidden / columns] on each chip -> the same shape; the tokens are added to the cache."""
        q, kv = cls._project(x, cfg, batch.rope)
        q = ttnn.permute(q, (0, 2, 1, 3))
        outputs = [cls._attend_group(q, kv, cfg, group) for group in batch.groups]
        return cls._output(_joined(outputs), cfg)

    @classmethod
    def forward_decode(cls, x: ttnn.Tensor, cfg: MLARunConfig, batch: DecodeBatch) -> ttnn.Tensor:
        """x [1, 1, users, hidden / columns] on each chip -> the same shape; the tokens are added to the cache."""
        q, kv = cls._project(x, cfg, batch.rope)
        cls._write(kv, cfg, batch)
        q = ttnn.permute(q, (0, 2, 1, 3))
        if columns(cfg["mesh_device"]) == 1:
            q = ttnn.to_memory_config(q, batch.q_memory_config)
        else:
            q = composite.all_to_all(q, **cfg["users_for_heads"], memory_config=batch.q_memory_config)
        attended = ttnn.transformer.paged_flash_multi_latent_attention_decode(
            q, cfg["kv_cache"], page_table_tensor=batch.pages, cur_pos_tensor=batch.positions, **cfg["attention"]
        )
        scattered = None if batch.norms is None else batch.norms[0].memory_config
        return cls._output(composite.all_to_all(attended, **cfg["heads_for_users"]), cfg, scattered)

    @classmethod
    def _write(cls, kv: ttnn.Tensor, cfg: MLARunConfig, batch: DecodeBatch) -> None:
        """Adds entries kv [1, 1, users, kv_dim] to the caches of their users' chips.

        Every chip of a row has those of all its users, and skips what is not its own: at position -1. Where they are
        more than a tile, which would not fit L1, each chip cuts out its own first.
        """
        writes = batch.writes
        if writes is None:
            own = composite.mesh_partition(ttnn.permute(kv, (0, 2, 1, 3)), **cfg["kv_partition"])
            kv, positions, pages = ttnn.to_memory_config(own, batch.kv_memory_config), batch.positions, batch.pages
        else:
            kv = ttnn.permute(kv, (0, 2, 1, 3), memory_config=writes.memory_config)
            positions, pages = writes.positions, writes.pages
        ttnn.experimental.paged_update_cache(cfg["kv_cache"], kv, update_idxs_tensor=positions, page_table=pages)

    @classmethod
    def _project(cls, x: ttnn.Tensor, cfg: MLARunConfig, rope: Rope) -> tuple[ttnn.Tensor, ttnn.Tensor]:
        """Returns queries [1, heads / columns, tokens, kv_dim] and the entries of the cache, [1, 1, tokens, kv_dim]."""
        config = cfg["config"]
        q_latent, kv_latent, k_rope = fused.gathered_linear(x, cfg["semaphores"], **cfg["wq_kv_a"])
        q_nope, q_rope = composite.split_heads(
            ttnn.linear(ttnn.rms_norm(q_latent, **cfg["q_norm"]), **cfg["wq_b"]),
            config.num_attention_heads // columns(cfg["mesh_device"]),
            config.qk_nope_head_dim,
        )
        q = cls._rotate(q_rope, ttnn.linear(q_nope, **cfg["wkv_b1"]), cfg, rope)
        return q, cls._rotate(k_rope, ttnn.rms_norm(kv_latent, **cfg["kv_norm"]), cfg, rope)

    @classmethod
    def _rotate(cls, x: ttnn.Tensor, before: ttnn.Tensor, cfg: MLARunConfig, rope: Rope) -> ttnn.Tensor:
        """Rotates x [1, heads, tokens, rope width] and puts it behind `before` [1, heads, tokens, kv_lora_rank]."""
        return ttnn.experimental.deepseek_prefill.rotary_embedding_indexed(
            x, rope.cos, rope.sin, rope.transformation, concat_prefix=before, **cfg["rope"]
        )

    @classmethod
    def _attend_group(cls, q: ttnn.Tensor, kv: ttnn.Tensor, cfg: MLARunConfig, group: PrefillGroup) -> ttnn.Tensor:
        """Attends to the cache for one group: outputs [1, tokens of its lanes, heads / columns, kv_lora_rank].

        q [1, tokens, heads / columns, kv_dim], kv [1, 1, tokens, kv_dim].
        """
        cache = cfg["kv_cache"]
        kv_lanes = _joined([_tokens(kv, 2, begin, group.length) for begin in group.lanes], dim=2)
        own_kv = composite.mesh_partition(kv_lanes, **cfg["kv_partition"])
        ttnn.experimental.paged_fill_cache(cache, ttnn.typecast(own_kv, cache.dtype), group.chunk_pages, batch_idx=0)
        q_lanes = _joined([_tokens(q, 1, begin, group.length) for begin in group.lanes])
        own_q = composite.all_to_all(q_lanes, **cfg["users_for_heads"])
        attended = ttnn.transformer.chunked_flash_mla_prefill(
            ttnn.permute(own_q, (0, 2, 1, 3)),
            cache,
            cfg["config"].kv_lora_rank,
            group.pages,
            group.start,
            **cfg["attention"],
        )
        lanes = composite.all_to_all(ttnn.permute(attended, (0, 2, 1, 3)), **cfg["heads_for_users"])
        return _joined([_tokens(lanes, 1, column * group.length, group.length) for column in group.columns])

    @classmethod
    def _output(
        cls, attended: ttnn.Tensor, cfg: MLARunConfig, memory_config: ttnn.MemoryConfig | None = None
    ) -> ttnn.Tensor:
        """Projects attended latents: [1, tokens, heads / columns, kv_lora_rank] -> [1, 1, tokens, hidden / columns].

        The result lies as the reduce-scatter's config says, or as `memory_config` does.
        """
        values = ttnn.linear(ttnn.permute(attended, (0, 2, 1, 3)), **cfg["wkv_b2"])
        partial = ttnn.linear(ttnn.experimental.nlp_concat_heads(values), **cfg["wo"])
        options = dict(**cfg["reduce_scatter"])
        if memory_config is not None:
            options["memory_config"] = memory_config
        return composite.reduce_scatter(partial, **options)


def _sdpa_program(q_chunk: int, k_chunk: int) -> ttnn.SDPAProgramConfig:
    return ttnn.SDPAProgramConfig(
        compute_with_storage_grid_size=SDPA_GRID, q_chunk_size=q_chunk, k_chunk_size=k_chunk, exp_approx_mode=False
    )


def _tokens(x: ttnn.Tensor, dim: int, begin: int, length: int) -> ttnn.Tensor:
    """Returns a range of tokens on dimension `dim`; x itself where it is all of them."""
    if length == x.shape[dim]:
        return x
    begins, ends = [0, 0, 0, 0], list(x.shape)
    begins[dim], ends[dim] = begin, begin + length
    return ttnn.slice(x, begins, ends)


def _joined(parts: list[ttnn.Tensor], dim: int = 1) -> ttnn.Tensor:
    return parts[0] if len(parts) == 1 else ttnn.concat(parts, dim=dim)
