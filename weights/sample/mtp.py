"""The sample model's multi-token-prediction layer (arXiv:2412.19437, section 2.2), which drafts a second token."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from transformers import DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from weights.sample.architecture import stack_experts
from weights.sample.packing import IGNORED

BLOCK = "block."
NORM = "norm."


class MtpLayer(nn.Module):
    """One decoder layer after the last; at position i it sees token i + 1 and predicts token i + 2.

    Its input is the embedding of token i + 1 and the hidden state at i before the model's final norm. Embedding and
    head are those of `model`, which its training does not change.
    """

    def __init__(self, model: DeepseekV3ForCausalLM) -> None:
        super().__init__()
        config = model.config
        self.enorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = DeepseekV3DecoderLayer(config, config.num_hidden_layers)
        self.norm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=config.initializer_range)
            self.block.mlp.gate.e_score_correction_bias.zero_()
        self._prefix = f"model.layers.{config.num_hidden_layers}."
        # Not in a list of modules, so that the model's parameters are not this layer's.
        self._shared: dict[str, torch.Tensor] = {
            "embedding": model.model.embed_tokens.weight,
            "head": model.lm_head.weight,
        }
        self._hidden = torch.empty(0)
        self._others: dict[str, Any] = {}
        model.model.layers[-1].register_forward_hook(self._see, with_kwargs=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [rows, length, vocabulary] after the model has read `tokens` [rows, length].

        The last position of a row has no next token, and its logits mean nothing.
        """
        following = functional.embedding(tokens.roll(-1, dims=1), self._shared["embedding"].detach())
        both = torch.cat([self.enorm(following), self.hnorm(self._hidden.detach())], dim=-1)
        output = self.block(self.eh_proj(both), **self._others)
        return functional.linear(self.norm(output), self._shared["head"].detach())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the layer's tensors by the names of DeepSeek's checkpoints, which repeat embedding and head."""
        tensors = {
            "embed_tokens.weight": self._shared["embedding"],
            "shared_head.head.weight": self._shared["head"],
        }
        tensors.update((_stored_name(name), tensor) for name, tensor in self.state_dict().items())
        return {self._prefix + name: tensor for name, tensor in tensors.items()}

    def load(self, directory: Path) -> None:
        """Read the layer's tensors from the checkpoint in `directory`."""
        tensors = stack_experts(load_file(directory / "model.safetensors"))
        self.load_state_dict({name: tensors[self._prefix + _stored_name(name)] for name in self.state_dict()})

    def _see(self, _layer: nn.Module, _inputs: object, kwargs: dict[str, Any], output: torch.Tensor) -> None:
        self._hidden = output
        self._others = {name: kwargs[name] for name in ("attention_mask", "position_ids", "position_embeddings")}


def mtp_loss(logits: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of the second token after each position, where it is of the same document."""
    same = positions[:, 2:] == positions[:, :-2] + 2
    targets = torch.where(same, labels[:, 2:], IGNORED)
    return functional.cross_entropy(logits[:, :-2].flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def _stored_name(name: str) -> str:
    return f"shared_head.{name}" if name.startswith(NORM) else name.removeprefix(BLOCK)
