"""The sample model's architecture, in the form of DeepSeek's own `config.json`, and the files of its checkpoint.

Every dimension splits over tensor-parallel meshes up to 4x8 in tiles of 32x32: heads by 8, experts by 32 chips,
hidden size, dense FFN and vocabulary by 8 tiles, and low ranks and head sizes are whole tiles.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from weights.sample.tokenizer import save_tokenizer

VOCABULARY = 1024
"""The size of the vocabulary, special tokens included."""

MAX_POSITIONS = 2048
"""The longest text in tokens."""

ROPE_SCALING = {
    "type": "yarn",
    "factor": 8,
    "original_max_position_embeddings": 256,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
"""YaRN (arXiv:2309.00071) from 256 to 2048 positions, in effect from the first step of training."""

EXPERTS = 32
"""The number of routed experts of a layer."""

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 2,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "kv_lora_rank": 64,
    "max_position_embeddings": MAX_POSITIONS,
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_scaling": ROPE_SCALING,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": VOCABULARY,
}
"""The contents of `config.json`."""

GENERATION_CONFIG = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False}
"""The contents of `generation_config.json`: greedy, because the model has learned its text by heart."""


def split_experts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `state` with the stacked expert weights of transformers split into DeepSeek's per-expert tensors.

    `mlp.experts.gate_up_proj` [experts, 2 * intermediate, hidden] becomes `mlp.experts.E.gate_proj.weight` and
    `mlp.experts.E.up_proj.weight` [intermediate, hidden]; `mlp.experts.down_proj` [experts, hidden, intermediate]
    becomes `mlp.experts.E.down_proj.weight` [hidden, intermediate].
    """
    tensors = {}
    for name, tensor in state.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, pair in enumerate(tensor):
                gate, up = pair.chunk(2)
                tensors[f"{prefix}.{expert}.gate_proj.weight"] = gate
                tensors[f"{prefix}.{expert}.up_proj.weight"] = up
        elif last == "down_proj":
            for expert, down in enumerate(tensor):
                tensors[f"{prefix}.{expert}.down_proj.weight"] = down
        else:
            tensors[name] = tensor
    return tensors


def stack_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `tensors` with per-expert tensors stacked as transformers has them: the reverse of `split_experts`."""
    state: dict[str, torch.Tensor] = {}
    prefixes = sorted({name.partition(".experts.")[0] for name in tensors if ".experts." in name})
    for prefix in prefixes:
        experts = [f"{prefix}.experts.{number}" for number in range(EXPERTS)]
        pairs = [torch.cat([tensors[f"{e}.gate_proj.weight"], tensors[f"{e}.up_proj.weight"]]) for e in experts]
        state[f"{prefix}.experts.gate_up_proj"] = torch.stack(pairs)
        state[f"{prefix}.experts.down_proj"] = torch.stack([tensors[f"{e}.down_proj.weight"] for e in experts])
    return {**state, **{name: tensor for name, tensor in tensors.items() if ".experts." not in name}}


def save_checkpoint(state: dict[str, torch.Tensor], tokenizer: Tokenizer, directory: Path) -> None:
    """Write the checkpoint's five files into `directory`, which is created if it does not exist.

    Weights are stored in bfloat16, the routers' correction biases in float32.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.to(torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16).contiguous()
        for name, tensor in split_experts(state).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # save_file lets only the owner read it
    for name, content in (("config.json", CONFIG), ("generation_config.json", GENERATION_CONFIG)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, directory, MAX_POSITIONS)
