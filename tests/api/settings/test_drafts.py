"""The options of drafts: two spellings of one number, and what stages, cache and scheduler are told of it."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from api.engine.options import EngineOptions
from api.errors import OptionError
from api.settings import engine as settings_module
from api.settings.engine import EngineSettings
from api.text.model_source import ModelSource, resolve_model
from stages.options import DRAFTS_MAX
from tests.support.command_line import refused
from tests.support.plans import r1_config
from weights.model_config import ModelConfig
from weights.sample import SAMPLE_DIR

CONFIG = ModelConfig.from_file(SAMPLE_DIR / "config.json")
WITHOUT_LAYER = msgspec.structs.replace(CONFIG, num_nextn_predict_layers=0)
SAMPLE = resolve_model(None, {})
R1 = ModelSource(path=Path("r1"), name="r1", root="r1")


def options(config: ModelConfig = CONFIG, source: ModelSource = SAMPLE, **given: Any) -> EngineOptions:
    return EngineSettings.of(cache_dir=Path("cache"), **given).engine_options(source, config)


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({}, 0),
        ({"num_speculative_tokens": 3}, 3),
        ({"speculative_config": '{"method": "mtp", "num_speculative_tokens": 2}'}, 2),
        ({"speculative_config": '{"method": "deepseek_mtp", "num_speculative_tokens": 1}'}, 1),
        ({"speculative_config": '{"method": "mtp"}'}, 1),
        ({"speculative_config": '{"num_speculative_tokens": 8}'}, 8),
        ({"speculative_config": '{"method": "mtp"}', "num_speculative_tokens": 1}, 1),
    ],
)
def test_stages_and_scheduler_are_told_the_number_of_drafts(given: dict[str, Any], count: int) -> None:
    made = options(**given)
    assert made.pipeline.stage.drafts.num_speculative_tokens == count
    assert made.scheduler.num_speculative_tokens == count


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not JSON .*: write it like"),
        ("mtp", "is not JSON"),
        ("[1]", "is not a JSON object: write it like"),
        ('{"method": "eagle"}', "the method 'eagle' is not served, only \"mtp\""),
        ('{"method": null}', "the method None is not served"),
        ('{"method": ["mtp"]}', r"the method \['mtp'\] is not served"),
        ('{"model": "m", "draft_tensor_parallel_size": 1}', "'draft_tensor_parallel_size' and 'model' cannot be set"),
        ('{"num_speculative_tokens": 0}', f"num_speculative_tokens is 0: give a whole number from 1 to {DRAFTS_MAX}"),
        ('{"num_speculative_tokens": 9}', "num_speculative_tokens is 9"),
        ('{"num_speculative_tokens": true}', "num_speculative_tokens is True"),
        ('{"num_speculative_tokens": 1.5}', "num_speculative_tokens is 1.5"),
        ('{"num_speculative_tokens": "1"}', "num_speculative_tokens is '1'"),
    ],
)
def test_a_speculative_config_that_cannot_be_followed_is_one_sentence(config: str, message: str) -> None:
    with pytest.raises(OptionError, match=f"--speculative-config.* {message}"):
        options(speculative_config=config)


@pytest.mark.parametrize("number", [0, 2])
def test_two_spellings_must_say_the_same(number: int) -> None:
    with pytest.raises(OptionError, match=f"asks for 1 .* --num-speculative-tokens for {number}: leave one of them"):
        options(speculative_config='{"method": "mtp"}', num_speculative_tokens=number)


@pytest.mark.parametrize("number", [-1, DRAFTS_MAX + 1])
def test_a_number_outside_its_bounds_is_refused(number: int) -> None:
    with pytest.raises(OptionError, match="num_speculative_tokens"):
        options(num_speculative_tokens=number)


@pytest.mark.parametrize("device", [{}, {"device": "timed", "stage_time": [1.0]}])
def test_a_model_without_the_layer_drafts_nothing(device: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="has no multi-token-prediction layer"):
        options(WITHOUT_LAYER, num_speculative_tokens=1, **device)
    assert options(WITHOUT_LAYER, **device).pipeline.stage.drafts.num_speculative_tokens == 0


@pytest.mark.parametrize("times", [{}, {"stage_time": [1.0]}])
def test_timed_stages_draft_for_any_model_that_has_the_layer(times: dict[str, Any]) -> None:
    made = options(r1_config(), R1, device="timed", stages=16, max_model_len=4096, num_speculative_tokens=1, **times)
    assert made.pipeline.stage.drafts.num_speculative_tokens == 1


def test_the_cache_has_room_for_the_layer_of_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    block_bytes = 32 * (CONFIG.num_hidden_layers + 1) * CONFIG.kv_dim * 4
    monkeypatch.setattr(settings_module, "memory_bytes", lambda: 4 * 1000 * block_bytes)
    with_drafts = options(max_model_len=640, max_num_seqs=60, num_speculative_tokens=2).pipeline.stage.cache.blocks
    assert with_drafts == 1000 < options(max_model_len=640, max_num_seqs=60).pipeline.stage.cache.blocks


def test_the_command_line_takes_both_spellings_and_ends_with_code_2() -> None:
    assert "the method 'eagle' is not served" in refused("serve", "--speculative-config", '{"method": "eagle"}')
    assert "leave one of them out" in refused(
        "serve", "--speculative_config", '{"method": "mtp"}', "--num-speculative-tokens", "0"
    )
    assert "is not in the range 0<=x<=8" in refused("demo", "a", "--num-speculative-tokens", "9")


def test_a_file_of_options_may_have_the_object_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("speculative-config:\n  method: ngram\n")
    assert "the method 'ngram' is not served" in refused("serve", "--config", str(file))
