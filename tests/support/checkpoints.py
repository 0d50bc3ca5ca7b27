"""Small Hugging Face checkpoints of DeepSeek-V3 models for tests, and transformers' own model loaded from them.

Nothing here uses the code under test: names, shapes, quantisation and loading are written out plainly a second time.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

StoredDtype = Literal["float32", "bfloat16", "fp8"]
ScaleFormat = Literal["float32", "ue8m0", "e8m0"]
"""Any float32 as R1 has, powers of two in float32 as V3.1 has, or the same as float8_e8m0fnu."""

BLOCK = 128
FP8_MAX = 448.0

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
}
"""Sizes of the default model: whole tiles, eight heads, several groups of experts, ragged FP8 blocks."""


KIMI_K2: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "n_group": 1,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "seq_aux": True,
    "topk_group": 1,
    "transformers_version": "4.48.3",
}
"""What moonshotai/Kimi-K2-Instruct has otherwise in its config.json than DeepSeek-R1, sizes apart."""


def config_keys(overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A config.json with the keys of DeepSeek-R1's, the sizes of SMALL, and `overrides` on top."""
    keys: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 163840,
        "moe_layer_freq": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.3",
        "use_cache": True,
        **SMALL,
        **(overrides or {}),
    }
    keys.setdefault("num_key_value_heads", keys["num_attention_heads"])
    return keys


def write_checkpoint(
    path: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    dtype: StoredDtype = "bfloat16",
    shards: int = 1,
    seed: int = 0,
    mtp_layer: bool = False,
    negative_biases: bool = False,
    scale_format: ScaleFormat = "float32",
) -> Path:
    """Writes config.json and the weights of a random model to the directory `path`, and returns it.

    With `dtype` "fp8" the linear layers that DeepSeek-R1 stores so are float8_e4m3fn with a float32 scale per 128x128
    block, in `scale_format`, the rest bfloat16. More than one of `shards` makes an index; scales then may lie in
    another shard than their weights. `mtp_layer` adds the multi-token-prediction layer after the last.
    `negative_biases` makes every router correction bias so negative that scores stay below zero.
    """
    path.mkdir(parents=True, exist_ok=True)
    keys = config_keys(overrides)
    if dtype == "fp8":
        keys["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
        if scale_format != "float32":
            keys["quantization_config"]["scale_fmt"] = "ue8m0"
    (path / "config.json").write_text(json.dumps(keys, indent=2))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _tensors(keys, generator, mtp_layer, negative_biases):
        if name.endswith("e_score_correction_bias") or dtype == "float32":
            tensors[name] = tensor
        elif dtype == "fp8" and "_proj" in name and "eh_proj" not in name:
            tensors[name], tensors[name + "_scale_inv"] = quantise(tensor, scale_format)
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    _write_shards(path, tensors, shards)
    return path


def quantise(weight: torch.Tensor, scale_format: ScaleFormat = "float32") -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 matrix as float8_e4m3fn and one scale per 128x128 block: value = fp8 * scale."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    quantised = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for row, column in _blocks(scales):
        block = weight[_span(row), _span(column)]
        scale = float(block.abs().max()) / FP8_MAX
        scales[row, column] = scale if scale_format == "float32" else 2.0 ** math.ceil(math.log2(scale))
        quantised[_span(row), _span(column)] = (block / scales[row, column]).to(torch.float8_e4m3fn)
    return quantised, scales.to(torch.float8_e8m0fnu) if scale_format == "e8m0" else scales


def dequantise_plainly(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 matrix that `quantise` stored, block by block."""
    values = weight.to(torch.float32)
    for row, column in _blocks(scales):
        values[_span(row), _span(column)] *= scales[row, column].float().item()
    return values


def stored_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint as float32, FP8 dequantised, read by safetensors' own loader."""
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        stored.update(load_file(file))
    values = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            values[name] = dequantise_plainly(tensor, stored[name + "_scale_inv"])
        else:
            values[name] = tensor.to(torch.float32)
    return values


def reference_model(path: Path, *, mtp_layer: bool = False) -> DeepseekV3ForCausalLM:
    """transformers' DeepSeek-V3 with the checkpoint's weights: float32, eager attention and experts, eval mode.

    With `mtp_layer` the decoder layer of the multi-token-prediction layer is one more of the model's layers.
    """
    keys = json.loads((path / "config.json").read_text())
    keys["num_hidden_layers"] += mtp_layer
    keys.pop("quantization_config", None)
    keys["torch_dtype"] = "float32"
    config = DeepseekV3Config.from_dict(keys)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model: DeepseekV3ForCausalLM = DeepseekV3ForCausalLM(config)
    torch.nn.Module.eval(model)
    stored = stored_tensors(path)
    inner = keys["moe_intermediate_size"]
    with torch.no_grad():
        for name, target in model.state_dict().items():
            if name == "lm_head.weight" and keys["tie_word_embeddings"]:
                target.copy_(stored["model.embed_tokens.weight"])
            elif name.endswith(".experts.gate_up_proj"):
                experts = name.removesuffix("gate_up_proj")
                for expert in range(keys["n_routed_experts"]):
                    target[expert, :inner].copy_(stored[f"{experts}{expert}.gate_proj.weight"])
                    target[expert, inner:].copy_(stored[f"{experts}{expert}.up_proj.weight"])
            elif name.endswith(".experts.down_proj"):
                experts = name.removesuffix("down_proj")
                for expert in range(keys["n_routed_experts"]):
                    target[expert].copy_(stored[f"{experts}{expert}.down_proj.weight"])
            else:
                target.copy_(stored[name])
    return model


def _blocks(scales: torch.Tensor) -> Iterator[tuple[int, int]]:
    return ((row, column) for row in range(scales.shape[0]) for column in range(scales.shape[1]))


def _span(block: int) -> slice:
    return slice(block * BLOCK, (block + 1) * BLOCK)


def _tensors(
    keys: Mapping[str, Any], generator: torch.Generator, mtp_layer: bool, negative_biases: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and float32 values. Scales keep every residual branch smaller than the stream, so that rounding stays."""

    def norm(name: str, size: int) -> tuple[str, torch.Tensor]:
        return name + ".weight", 1.0 + 0.1 * torch.randn(size, generator=generator)

    def linear(name: str, rows: int, columns: int, gain: float = 1.0) -> tuple[str, torch.Tensor]:
        return name + ".weight", torch.randn(rows, columns, generator=generator) * gain * columns**-0.5

    def mlp(prefix: str, inner: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield linear(prefix + "gate_proj", inner, hidden)
        yield linear(prefix + "up_proj", inner, hidden)
        yield linear(prefix + "down_proj", hidden, inner, gain=0.5)

    def layer(prefix: str, moe: bool) -> Iterator[tuple[str, torch.Tensor]]:
        yield norm(prefix + "input_layernorm", hidden)
        attention = prefix + "self_attn."
        qk_head_dim = keys["qk_nope_head_dim"] + keys["qk_rope_head_dim"]
        yield linear(attention + "q_a_proj", keys["q_lora_rank"], hidden)
        yield norm(attention + "q_a_layernorm", keys["q_lora_rank"])
        yield linear(attention + "q_b_proj", heads * qk_head_dim, keys["q_lora_rank"])
        yield linear(attention + "kv_a_proj_with_mqa", keys["kv_lora_rank"] + keys["qk_rope_head_dim"], hidden)
        yield norm(attention + "kv_a_layernorm", keys["kv_lora_rank"])
        yield linear(
            attention + "kv_b_proj", heads * (keys["qk_nope_head_dim"] + keys["v_head_dim"]), keys["kv_lora_rank"]
        )
        yield linear(attention + "o_proj", hidden, heads * keys["v_head_dim"], gain=0.5)
        yield norm(prefix + "post_attention_layernorm", hidden)
        if not moe:
            yield from mlp(prefix + "mlp.", keys["intermediate_size"])
            return
        experts = keys["n_routed_experts"]
        yield linear(prefix + "mlp.gate", experts, hidden)
        bias = 0.05 * torch.randn(experts, generator=generator)
        yield prefix + "mlp.gate.e_score_correction_bias", bias - 2.0 if negative_biases else bias
        for expert in range(experts):
            yield from mlp(f"{prefix}mlp.experts.{expert}.", keys["moe_intermediate_size"])
        yield from mlp(prefix + "mlp.shared_experts.", keys["moe_intermediate_size"] * keys["n_shared_experts"])

    hidden, heads, layers = keys["hidden_size"], keys["num_attention_heads"], keys["num_hidden_layers"]
    # A tied table is also the head, whose logits must not be sqrt(hidden) times too large.
    table_scale = hidden**-0.5 if keys["tie_word_embeddings"] else 1.0
    yield "model.embed_tokens.weight", torch.randn(keys["vocab_size"], hidden, generator=generator) * table_scale
    for index in range(layers):
        yield from layer(f"model.layers.{index}.", moe=index >= keys["first_k_dense_replace"])
    if mtp_layer:
        prefix = f"model.layers.{layers}."
        yield from layer(prefix, moe=True)
        yield prefix + "embed_tokens.weight", torch.randn(keys["vocab_size"], hidden, generator=generator)
        yield norm(prefix + "enorm", hidden)
        yield norm(prefix + "hnorm", hidden)
        yield linear(prefix + "eh_proj", hidden, 2 * hidden)
        yield norm(prefix + "shared_head.norm", hidden)
        yield linear(prefix + "shared_head.head", keys["vocab_size"], hidden)
    yield norm("model.norm", hidden)
    if not keys["tie_word_embeddings"]:
        yield linear("lm_head", keys["vocab_size"], hidden)


def _write_shards(path: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
