"""Reading config.json: against transformers' own configuration and model, and every refusal."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from stages.models.registry import ARCHITECTURES
from tests.support.checkpoints import KIMI_K2, config_keys
from weights.errors import CheckpointError
from weights.model_config import MODEL_TYPES, ConfigChanges, ModelConfig


def read(**overrides: Any) -> ModelConfig:
    return ModelConfig.from_dict(config_keys(overrides), source="config.json")


def test_the_default_sizes_of_transformers_are_those_of_r1() -> None:
    config = ModelConfig.from_hf(DeepseekV3Config())
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (61, 7168, 129280)
    assert (config.qk_head_dim, config.kv_dim) == (192, 576)
    assert [layer for layer in range(61) if not config.is_moe(layer)] == [0, 1, 2]


@pytest.mark.parametrize("rope_scaling", [config_keys()["rope_scaling"], None])
def test_deepseeks_layout_and_that_of_transformers_5_mean_the_same(rope_scaling: dict[str, Any] | None) -> None:
    keys = config_keys({"rope_scaling": rope_scaling})
    assert ModelConfig.from_hf(DeepseekV3Config.from_dict(keys)) == ModelConfig.from_dict(keys, source="config.json")


@pytest.mark.parametrize(
    "rope_scaling",
    [
        None,
        config_keys()["rope_scaling"],
        {**config_keys()["rope_scaling"], "mscale": 0.707, "mscale_all_dim": 0.707},
        {**config_keys()["rope_scaling"], "mscale_all_dim": 0.0},
    ],
)
def test_the_softmax_scale_is_that_of_transformers(rope_scaling: dict[str, Any] | None) -> None:
    keys = config_keys({"rope_scaling": rope_scaling})
    attention = DeepseekV3Attention(DeepseekV3Config.from_dict(keys), layer_idx=0)
    assert math.isclose(read(rope_scaling=rope_scaling).softmax_scale, attention.scaling, rel_tol=1e-12)


def test_a_model_config_is_taken_as_it_is() -> None:
    config = read()
    assert ModelConfig.from_hf(config) is config


@pytest.mark.parametrize(("eos", "expected"), [(1, (1,)), ([1, 7], (1, 7)), (None, ())])
def test_end_tokens_are_one_or_several_or_none(eos: Any, expected: tuple[int, ...]) -> None:
    assert read(eos_token_id=eos).eos_token_ids == expected


def test_block_fp8_is_accepted() -> None:
    assert read(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}) == read()


def test_deepseek_v3_1_is_accepted_with_its_scale_format() -> None:
    fp8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    assert read(quantization_config={**fp8, "scale_fmt": "ue8m0"}) == read()


def test_kimi_k2_is_a_deepseek_v3_of_other_numbers() -> None:
    kimi, r1 = ModelConfig.from_dict(config_keys(KIMI_K2), source="config.json"), read()
    assert kimi.architecture == r1.architecture
    assert (kimi.n_group, kimi.topk_group, kimi.rope_theta, kimi.yarn and kimi.yarn.factor) == (1, 1, 50000, 32)


@pytest.mark.parametrize(("given", "expected"), [(1, 1), (0, 0), (2, 2), (None, 0)])
def test_multi_token_prediction_layers_are_counted(given: int | None, expected: int) -> None:
    config = read(num_nextn_predict_layers=given)
    assert config.num_nextn_predict_layers == expected
    assert config.without_drafts == read(num_nextn_predict_layers=0)


def test_the_first_layers_of_a_model_are_not_followed_by_its_multi_token_prediction_layer() -> None:
    config = read(num_hidden_layers=3, num_nextn_predict_layers=1)
    assert config.changed(ConfigChanges(num_hidden_layers=2)).num_nextn_predict_layers == 0
    for changes in (ConfigChanges(), ConfigChanges(num_hidden_layers=3), ConfigChanges(first_k_dense_replace=2)):
        assert config.changed(changes).num_nextn_predict_layers == 1


def test_every_architecture_that_a_config_may_name_is_registered() -> None:
    assert set(MODEL_TYPES.values()) == set(ARCHITECTURES)


def test_a_deepseek_configs_encoding_is_what_it_was_before_there_were_families() -> None:
    """Cache keys are made of it: entries of earlier releases are found again."""
    assert not {"architecture", "num_nextn_predict_layers"} & msgspec.to_builtins(read().without_drafts).keys()


def test_kimi_k2s_own_sizes_are_accepted() -> None:
    sizes = {"n_routed_experts": 384, "num_experts_per_tok": 8, "num_attention_heads": 64, "vocab_size": 163840}
    keys = config_keys({**KIMI_K2, **sizes, "bos_token_id": 163584, "eos_token_id": [163585, 163586]})
    config = ModelConfig.from_dict(keys, source="config.json")
    assert (config.n_routed_experts, config.eos_token_ids) == (384, (163585, 163586))


YARN = config_keys()["rope_scaling"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only 'deepseek_v3' and 'kimi_k2' checkpoints can be served"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; DeepSeek-V3 has 'silu'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"q_lora_rank": None}, "q_lora_rank is null"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must equal num_attention_heads (8)"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised with 'awq'"),
        ({"quantization_config": "int4"}, "quantised with 'int4'"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            "weight_block_size is [64, 64]",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size is None"),
        ({"rope_scaling": "yarn"}, "rope_scaling is not a JSON object"),
        ({"rope_scaling": {**YARN, "type": "linear"}}, "rope type 'linear' is unknown"),
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, "original_max_position_embeddings"),
        ({"rope_scaling": {**YARN, "factor": 0}}, "rope_scaling.factor is 0.0; it must be positive"),
        ({"rope_theta": float("inf")}, "rope_theta is inf; it must be positive"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be positive"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be positive"),
        ({"hidden_size": "256"}, "Expected `int`, got `str` - at `$.hidden_size`"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace is negative"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers is negative"),
        ({"num_nextn_predict_layers": "1"}, "Expected `int`, got `str` - at `$.num_nextn_predict_layers`"),
        ({"qk_rope_head_dim": 31}, "qk_rope_head_dim is 31; rotary positions need pairs"),
        ({"eos_token_id": 512}, "eos_token_id 512 is not in the vocabulary of 512"),
        ({"n_routed_experts": 18}, "18 experts cannot form 4 equal groups"),
        ({"n_routed_experts": 4}, "groups of 1 expert"),
        ({"topk_group": 5}, "topk_group 5 of only 4 groups"),
        ({"num_experts_per_tok": 9}, "9 experts a token, but the 2 groups chosen hold 8"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_in_one_sentence(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        read(**overrides)
    assert sentence in str(refusal.value)
    assert str(refusal.value).startswith("config.json: ")


def test_a_missing_key_is_named() -> None:
    keys = config_keys()
    del keys["kv_lora_rank"]
    with pytest.raises(CheckpointError, match=r"missing required field `kv_lora_rank`"):
        ModelConfig.from_dict(keys, source="config.json")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[]", "does not contain a JSON object"),
        ("[" * 100_000, "is not valid JSON"),
        ("\xff", "is not valid JSON"),
        (json.dumps({"padding": " " * (1 << 20)}), "is larger than 1048576 bytes"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError) as refusal:
        ModelConfig.from_file(path)
    assert str(refusal.value).startswith(f"{path} ")
    assert sentence in str(refusal.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Cannot read .*config\.json: No such file or directory\."):
        ModelConfig.from_file(tmp_path / "config.json")
