"""Random weights: reproducible from seed and name in any order of reading, and of sensible size."""

import hashlib
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from tests.support.checkpoints import config_keys, stored_tensors, write_checkpoint
from weights.checkpoint import RandomCheckpoint
from weights.errors import CheckpointError
from weights.model_config import ModelConfig

CONFIG = ModelConfig.from_dict(config_keys(), source="config.json")
TIED = ModelConfig.from_dict(config_keys({"tie_word_embeddings": True}), source="config.json")
DRAFT = "model.layers.3."
"""The multi-token-prediction layer."""
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def test_names_and_shapes_are_those_of_a_checkpoint(tmp_path: Path) -> None:
    stored = stored_tensors(write_checkpoint(tmp_path, mtp_layer=True))
    weights = RandomCheckpoint(CONFIG, seed=0)
    copies = {DRAFT + "embed_tokens.weight", DRAFT + "shared_head.head.weight"}
    assert weights.names() == sorted(stored.keys() - copies)
    for name in weights.names():
        assert weights.tensor(name).shape == stored[name].shape, name


def test_a_multi_token_prediction_layer_changes_no_other_part() -> None:
    weights, without = RandomCheckpoint(CONFIG, seed=0), RandomCheckpoint(CONFIG.without_drafts, seed=0)
    assert (weights.has_draft_layer, without.has_draft_layer) == (True, False)
    assert [name for name in weights.names() if not name.startswith(DRAFT)] == without.names()
    for part in ("model.embed_tokens.", "model.layers.2.", "lm_head."):
        assert weights.fingerprint(part) == without.fingerprint(part)


def test_a_tensor_does_not_depend_on_what_was_asked_for_before() -> None:
    forwards, backwards = RandomCheckpoint(CONFIG, seed=5), RandomCheckpoint(CONFIG, seed=5)
    names = forwards.names("model.layers.1.")
    first = {name: forwards.tensor(name) for name in names}
    for name in reversed(names):
        assert torch.equal(backwards.tensor(name), first[name]), name


DIGEST = """
import hashlib, msgspec, sys, torch
from weights.model_config import ModelConfig
from weights.checkpoint import RandomCheckpoint
weights = RandomCheckpoint(msgspec.json.decode(sys.argv[1], type=ModelConfig), seed=5)
print(hashlib.sha256(weights.tensor(sys.argv[2]).view(torch.uint8).numpy().tobytes()).hexdigest())
"""


def test_another_process_has_the_same_bits() -> None:
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    bits = RandomCheckpoint(CONFIG, seed=5).tensor(name).view(torch.uint8).numpy().tobytes()
    command = [sys.executable, "-c", DIGEST, msgspec.json.encode(CONFIG).decode(), name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.strip() == hashlib.sha256(bits).hexdigest()


def test_seeds_and_names_give_unrelated_tensors() -> None:
    gate, up = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"
    tensors = [RandomCheckpoint(CONFIG, seed).tensor(name).float() for seed in (0, 1) for name in (gate, up)]
    correlations = torch.corrcoef(torch.stack([tensor.flatten() for tensor in tensors]))
    # 131072 values: chance correlations have a standard deviation of 0.0028.
    assert (correlations - torch.eye(4)).abs().max() < 0.02


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("model.embed_tokens.weight", 0.0, 1.0),
        ("lm_head.weight", 0.0, 256**-0.5),
        ("model.layers.1.self_attn.q_b_proj.weight", 0.0, 96**-0.5),
        ("model.layers.1.mlp.gate.weight", 0.0, 256**-0.5),
        ("model.layers.1.mlp.experts.0.down_proj.weight", 0.0, 64**-0.5),
        ("model.layers.1.input_layernorm.weight", 1.0, 0.1),
        ("model.layers.1.self_attn.kv_a_layernorm.weight", 1.0, 0.1),
        ("model.layers.3.eh_proj.weight", 0.0, 512**-0.5),
        ("model.layers.3.hnorm.weight", 1.0, 0.1),
        ("model.norm.weight", 1.0, 0.1),
    ],
)
def test_weights_are_scaled_by_their_fan_in_and_norms_are_near_one(name: str, mean: float, std: float) -> None:
    tensor = RandomCheckpoint(CONFIG, seed=0).tensor(name)
    assert tensor.dtype == torch.bfloat16
    assert abs(tensor.double().mean().item() - mean) < 5 * std * tensor.numel() ** -0.5
    assert tensor.double().std().item() == pytest.approx(std, rel=0.2 if tensor.dim() == 1 else 0.03)


def test_values_lie_symmetrically_about_zero() -> None:
    levels = set(RandomCheckpoint(CONFIG, seed=0).tensor("model.embed_tokens.weight").flatten().tolist())
    assert len(levels) == 256
    assert levels == {-level for level in levels}


def test_the_router_has_a_correction_bias_in_float32() -> None:
    bias = RandomCheckpoint(CONFIG, seed=0).tensor(BIAS)
    assert bias.dtype == torch.float32
    assert len(set(bias.tolist())) > 8
    assert 0.02 < bias.std().item() < 0.1


def test_a_tied_head_is_the_embedding() -> None:
    weights = RandomCheckpoint(TIED, seed=0)
    assert torch.equal(weights.tensor("lm_head.weight"), weights.tensor("model.embed_tokens.weight"))
    untied = RandomCheckpoint(CONFIG, seed=0)
    assert not torch.equal(untied.tensor("lm_head.weight"), untied.tensor("model.embed_tokens.weight"))


def test_a_fingerprint_follows_config_seed_and_prefixes() -> None:
    weights = RandomCheckpoint(CONFIG, seed=0)
    same = RandomCheckpoint(CONFIG, seed=0)
    assert weights.fingerprint("model.layers.0.") == same.fingerprint("model.layers.0.")
    others = [
        weights.fingerprint("model.layers.1."),
        RandomCheckpoint(CONFIG, seed=1).fingerprint("model.layers.0."),
        RandomCheckpoint(TIED, seed=0).fingerprint("model.layers.0."),
    ]
    assert len({weights.fingerprint("model.layers.0."), *others}) == 4


def test_a_scope_lists_the_tensors_under_a_prefix() -> None:
    weights = RandomCheckpoint(CONFIG, seed=0)
    scope = weights.view("model.layers.1.mlp.gate.")
    assert list(scope) == ["e_score_correction_bias", "weight"]
    assert torch.equal(scope["e_score_correction_bias"], weights.tensor(BIAS))


def test_what_the_model_does_not_have_is_refused() -> None:
    weights = RandomCheckpoint(CONFIG, seed=3)
    weights.validate("model.layers.2.", "lm_head.")
    with pytest.raises(CheckpointError, match=r"random weights of seed 3: the model has no tensor 'model\.bias'"):
        weights.tensor("model.bias")
    with pytest.raises(CheckpointError, match=r"no tensor of the model begins with 'model\.layers\.4\.'"):
        weights.validate("model.layers.4.")
