"""The weights of attention as its operations need them: fused, split and absorbed."""

from collections.abc import Callable
from pathlib import Path

import torch

from stages.backend import ttnn
from stages.models.deepseek_v3.weight_specs import DEFAULT_DTYPES, attention_weights
from stages.models.module import columns, share, transposed
from stages.run_config import StateDict, WeightConfig, dump_weight
from stages.tensor_dtypes import WeightDtypes
from weights.model_config import ModelConfig


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

    # Made one after the other, so that no two are held at once.
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
    """q_a_proj beside kv_a_proj_with_mqa, [1, 1, hidden, q_lora + kv_lora + rope]: one matmul and one all-reduce."""
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
