"""The weights of attention as its operations need them: fused, split and absorbed."""

from pathlib import Path

import torch

from stages.backend import ttnn
from stages.deepseek_v3.module import columns, share, transposed
from stages.deepseek_v3.rms_norm import convert_norm
from stages.run_config import StateDict, WeightConfig, dump_weight, weight_path
from weights.model_config import ModelConfig

HEADS = 1
INPUTS = 2
OUTPUTS = 3
"""Dimensions of a weight [1, heads, inputs, outputs] that the mesh's columns split."""


def convert_mla_weights(
    config: ModelConfig, state_dict: StateDict, output_path: Path, mesh_device: ttnn.MeshDevice
) -> WeightConfig:
    """Writes attention's weights; `state_dict` has the names of a checkpoint's self_attn.

    Raises PlanError where the heads or the hidden size cannot be shared by the columns.
    """
    share(config.num_attention_heads, columns(mesh_device), "The number of attention heads")
    share(config.hidden_size, columns(mesh_device), "The hidden size")

    def dump(operation: str, weight: torch.Tensor, dim: int) -> str:
        return dump_weight(
            weight_path(output_path, operation, "input_tensor_b"),
            weight,
            dtype=ttnn.bfloat8_b,
            mesh_device=mesh_device,
            dims=(None, dim),
        )

    return {
        "wq_kv_a": dump("wq_kv_a", fused_down_projection(state_dict), INPUTS),
        "q_norm": convert_norm(state_dict["q_a_layernorm.weight"], output_path, "q_norm", mesh_device, sharded=False),
        "kv_norm": convert_norm(
            state_dict["kv_a_layernorm.weight"], output_path, "kv_norm", mesh_device, sharded=False
        ),
        "wq_b": dump("wq_b", transposed(state_dict, "q_b_proj.weight"), OUTPUTS),
        "wkv_b1": dump("wkv_b1", key_projection(config, state_dict), HEADS),
        "wkv_b2": dump("wkv_b2", value_projection(config, state_dict), HEADS),
        "wo": dump("wo", transposed(state_dict, "o_proj.weight"), INPUTS),
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
