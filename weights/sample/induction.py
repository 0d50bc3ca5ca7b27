"""Weights to start from with which the model already copies: an induction head (arXiv:2209.11895) in two layers.

Sentences to repeat, arguments of tools and their results all need copying, of which a model with the usual random
weights had learned next to nothing after 330 steps of training. In the first layer, heads attend to the token before
and store its code. In the second, heads attend to where the present token's code is stored, which is the token after
its last occurrence, and write that token's code where the head of the model reads it. All of it is trained further like
any other weight.
"""

import torch
from torch import nn
from transformers import DeepseekV3ForCausalLM

CONSTANT = 0
"""The dimension of the hidden state that is the same for all tokens, so that heads can attend by position alone."""

CODE = slice(1, 65)
BEFORE = slice(160, 224)
COPIED = slice(224, 256)
"""The dimensions of a token's random code, of the code of the token before, and of half of the code of the copy."""

HEADS = 2
HALF = 32
"""The heads of each layer that take part, and the size of a head's key, rotary key and value, half of a code."""

SLOWEST = 0.01
"""The angle of a position, in radians, below which a rotation is not used."""

SCALE = 0.1
CONSTANT_SIZE = 0.6
POSITION_GAIN = 8.0
MATCH_GAIN = 4.0
LOGIT_GAIN = 0.15


@torch.no_grad()
def start_with_induction(model: DeepseekV3ForCausalLM) -> None:
    """Overwrite a part of the weights of a new model."""
    embedding = model.model.embed_tokens.weight
    # Of equal length, so that the norm before the first layer leaves the constant the same for all tokens.
    embedding *= SCALE * embedding.shape[1] ** 0.5 / embedding.norm(dim=1, keepdim=True)
    embedding[:, BEFORE.start :] *= model.config.initializer_range
    embedding[:, CONSTANT] = CONSTANT_SIZE
    _attend_to_the_token_before(model.model.layers[0].self_attn, model.model.rotary_emb.inv_freq)
    _attend_to_the_token_after_the_last_occurrence(model.model.layers[1].self_attn)
    model.lm_head.weight[:, COPIED] += LOGIT_GAIN / SCALE * embedding[:, CODE][:, HALF:]


def _attend_to_the_token_before(attention: nn.Module, frequencies: torch.Tensor) -> None:
    weights = _weights(attention)
    rank, heads = len(weights["kv_a"]) - HALF, _by_head(weights)
    # Constant queries and keys: their rotations agree best where the key is one position before the query.
    weights["q_a"][0] = torch.zeros_like(weights["q_a"][0])
    weights["q_a"][0, CONSTANT] = 1.0
    weights["kv_a"][:rank] = torch.eye(weights["kv_a"].shape[1])[CODE]
    constant = CONSTANT_SIZE / (SCALE * 1.07)  # after the norm
    fast = (frequencies > SLOWEST).to(frequencies.dtype)  # slower rotations tell no neighbours apart
    weights["kv_a"][rank::2, CONSTANT] = POSITION_GAIN / constant * fast
    angles = torch.stack([torch.cos(frequencies), -torch.sin(frequencies)], dim=1).flatten()
    weights["o"][:, : HEADS * HALF] = 0.0
    for head in range(HEADS):
        heads["q_b"][head, HALF:, 0] = POSITION_GAIN / 7 * angles
        heads["kv_b"][head, HALF:] = torch.eye(rank)[head * HALF : (head + 1) * HALF]
        weights["o"][BEFORE, head * HALF : (head + 1) * HALF] = SCALE * torch.eye(rank)[:, head * HALF :][:, :HALF]


def _attend_to_the_token_after_the_last_occurrence(attention: nn.Module) -> None:
    weights = _weights(attention)
    rank, heads = len(weights["kv_a"]) - HALF, _by_head(weights)
    identity = torch.eye(weights["kv_a"].shape[1])
    weights["q_a"][:] = identity[CODE]
    weights["kv_a"][:HALF] = identity[BEFORE][:HALF]
    weights["kv_a"][HALF:rank] = identity[CODE][HALF:]
    weights["o"][:, : HEADS * HALF] = 0.0
    for head in range(HEADS):
        heads["q_b"][head, :HALF] = MATCH_GAIN * torch.eye(rank)[:HALF]
        heads["kv_b"][head] = torch.eye(rank)  # the first half is the key, the second the value
        weights["o"][COPIED, head * HALF : (head + 1) * HALF] = SCALE * torch.eye(HALF)


def _weights(attention: nn.Module) -> dict[str, torch.Tensor]:
    names = {"q_a": "q_a_proj", "q_b": "q_b_proj", "kv_a": "kv_a_proj_with_mqa", "kv_b": "kv_b_proj", "o": "o_proj"}
    return {short: attention.get_parameter(f"{name}.weight") for short, name in names.items()}


def _by_head(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weights[name].view(-1, 2 * HALF, weights[name].shape[1]) for name in ("q_b", "kv_b")}
