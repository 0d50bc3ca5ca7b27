"""A trained model written as a checkpoint in DeepSeek's own layout."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from weights.sample.architecture import CONFIG, GENERATION_CONFIG, MAX_POSITIONS
from weights.sample.tokenizer import save_tokenizer


def split_experts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `state` with the stacked expert weights of transformers parted into DeepSeek's per-expert tensors.

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


def save_checkpoint(state: dict[str, torch.Tensor], tokenizer: Tokenizer, directory: Path) -> None:
    """Write the checkpoint's five files into `directory`, which is made where it does not exist.

    Weights are stored in bfloat16, the routers' correction biases in float32.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.to(torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16).contiguous()
        for name, tensor in split_experts(state).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)  # save_file leaves it to its owner alone
    for name, content in (("config.json", CONFIG), ("generation_config.json", GENERATION_CONFIG)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_tokenizer(tokenizer, directory, MAX_POSITIONS)
