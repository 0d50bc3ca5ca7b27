"""The multi-token-prediction layer of a checkpoint: its tensors, what is left aside, and what it does not change."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.checkpoints import config_keys, write_checkpoint
from weights import checkpoint as checkpoint_module
from weights.checkpoint import Checkpoint, RandomCheckpoint
from weights.errors import CheckpointError
from weights.model_config import ConfigChanges, ModelConfig

LAYER, DRAFT = "model.layers.1.", "model.layers.3."
"""A decoder layer of the default model, and its multi-token-prediction layer."""
COPIES = {DRAFT + "embed_tokens.weight", DRAFT + "shared_head.head.weight"}
"""What a checkpoint has of the model's embedding and head in that layer."""
BEFORE = "9390b801b7c73d63a8d281f49b7541dd8283c523b89ca9f1c7ebc64a943965e5"
"""The fingerprint of LAYER with random weights of seed 0, by the release before there were drafts."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", dtype="fp8", shards=3, mtp_layer=True)


@pytest.fixture
def without(tmp_path: Path) -> Path:
    """A checkpoint that lacks the layer that its config.json counts."""
    return write_checkpoint(tmp_path / "without", dtype="fp8")


def test_copies_in_the_multi_token_prediction_layer_are_left_aside(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    stored = set().union(*(load_file(file) for file in model.glob("*.safetensors")))
    assert stored > COPIES
    assert checkpoint.has_draft_layer
    checkpoint.validate(DRAFT)
    for name in COPIES:
        assert name not in checkpoint
        with pytest.raises(CheckpointError, match="the model has no tensor"):
            checkpoint.tensor(name)


def test_a_multi_token_prediction_layer_that_is_counted_may_be_left_out(without: Path) -> None:
    checkpoint = Checkpoint.open(without)
    assert checkpoint.config.num_nextn_predict_layers == 1
    assert not checkpoint.has_draft_layer
    checkpoint.validate("model.embed_tokens.", "model.layers.0.", "model.layers.1.", "model.layers.2.", "lm_head.")
    with pytest.raises(CheckpointError, match=r"lists no tensor 'model\.layers\.3\.eh_proj\.weight'"):
        checkpoint.validate(DRAFT)


def test_a_model_of_fewer_layers_has_no_multi_token_prediction_layer(model: Path) -> None:
    checkpoint = Checkpoint.open(model, ConfigChanges(num_hidden_layers=2))
    assert not checkpoint.has_draft_layer
    assert not [name for name in checkpoint.names() if name.startswith("model.layers.2.")]


def counted(path: Path, layers: int | None) -> Checkpoint:
    """The checkpoint with another number of multi-token-prediction layers in its config.json."""
    keys = json.loads((path / "config.json").read_text())
    keys.pop("num_nextn_predict_layers", None)
    if layers is not None:
        keys["num_nextn_predict_layers"] = layers
    (path / "config.json").write_text(json.dumps(keys))
    return Checkpoint.open(path)


def test_multi_token_prediction_layers_are_no_part_of_other_layers(
    without: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries of the cache from before there were drafts are found again."""
    monkeypatch.setattr(checkpoint_module, "SETTLED_S", -3600.0)
    found = [counted(without, layers) for layers in (1, 0, None, 2)]
    assert len({checkpoint.fingerprint(LAYER) for checkpoint in found}) == 1
    assert len({checkpoint.identity(LAYER) for checkpoint in found}) == 1
    assert None not in {checkpoint.identity(LAYER) for checkpoint in found}


def test_cache_keys_are_those_of_the_release_before() -> None:
    config = ModelConfig.from_dict(config_keys(), source="config.json")
    assert config.num_nextn_predict_layers == 1
    assert RandomCheckpoint(config, seed=0).fingerprint(LAYER) == BEFORE
