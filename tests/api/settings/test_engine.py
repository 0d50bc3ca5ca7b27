"""What the engine is told for given options, and what the log says of those that are not followed."""

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from api.engine.options import EngineOptions
from api.errors import OptionError
from api.settings import engine as settings_module
from api.settings.engine import EngineSettings
from api.text.model_source import ModelSource, resolve_model
from stages.errors import PlanError
from weights.model_config import ModelConfig
from weights.sample import SAMPLE_DIR

CONFIG = ModelConfig.from_file(SAMPLE_DIR / "config.json")
SAMPLE = resolve_model(None, {})


def options(source: ModelSource = SAMPLE, **given: Any) -> EngineOptions:
    return EngineSettings.of(cache_dir=Path("cache"), **given).engine_options(source, CONFIG)


def test_by_default_two_stages_serve_32_users_in_each_of_three_microbatches() -> None:
    with capture_logs() as logs:
        made = options()
    cache = made.pipeline.stage.cache
    assert [spec.layers for spec in made.pipeline.specs][-1][-1] == CONFIG.num_hidden_layers - 1
    assert len(made.pipeline.specs) == 2
    assert (cache.slots, cache.block_size, cache.max_model_len) == (96, 32, CONFIG.max_position_embeddings)
    assert made.scheduler.steps_in_flight == 3
    assert made.prefill_chunk == 2048
    assert made.pipeline.hidden_size == CONFIG.hidden_size
    assert Path(made.pipeline.stage.cache_dir).is_absolute()
    assert logs == []


def test_the_sample_runs_in_float32_and_others_in_bfloat16_unless_told() -> None:
    other = ModelSource(path=Path("other"), name="other", root="other")
    assert options().pipeline.stage.dtype == "float32"
    assert options(other).pipeline.stage.dtype == "bfloat16"
    assert options(other, dtype="float32").pipeline.stage.dtype == "float32"


def test_the_pipeline_is_brought_back_as_often_as_told() -> None:
    assert options().recovery.max_restarts == 10
    assert options(max_restarts=3).recovery.max_restarts == 3


def test_spares_wait_unless_they_are_not_wanted() -> None:
    assert options().pipeline.cluster.spare
    assert not options(spare=False).pipeline.cluster.spare


def test_stages_may_be_split_by_hand() -> None:
    made = options(layers_per_stage=[1, 4, 1])
    assert [len(spec.layers) for spec in made.pipeline.specs] == [1, 4, 1]
    with pytest.raises(OptionError, match="leave one of them out"):
        options(layers_per_stage=[2, 4], stages=3)
    with pytest.raises(PlanError, match="Cannot split 6 layers into 7 stages"):
        options(stages=7)


def test_what_is_rounded_is_said() -> None:
    with capture_logs() as logs:
        made = options(prefill_chunk=77, max_num_seqs=4)
    assert (made.prefill_chunk, made.pipeline.stage.cache.slots) == (96, 6)
    assert [(log["asked"], log.get("tokens"), log.get("slots")) for log in logs] == [(4, None, 6), (77, 96, None)]
    with capture_logs() as logs:
        options(prefill_chunk=64, max_num_seqs=6)
    assert logs == []


def test_the_cache_holds_all_requests_at_full_length_if_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    block_bytes = 32 * CONFIG.num_hidden_layers * CONFIG.kv_dim * 4
    monkeypatch.setattr(settings_module, "memory_bytes", lambda: 4 * 1000 * block_bytes)
    assert options(max_model_len=64, max_num_seqs=3).pipeline.stage.cache.blocks == 6
    with capture_logs() as logs:
        assert options(max_model_len=640, max_num_seqs=60).pipeline.stage.cache.blocks == 1000
    assert [(log["blocks"], log["wanted"]) for log in logs] == [(1000, 1200)]
    assert options(max_model_len=640, max_num_seqs=60, num_blocks=1200).pipeline.stage.cache.blocks == 1200
    monkeypatch.setattr(settings_module, "memory_bytes", lambda: 4 * 10 * block_bytes)
    with pytest.raises(OptionError, match="lower --max-model-len, or give --num-blocks"):
        options(max_model_len=640)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OptionError, match="more than the model's 2048 positions"):
        options(max_model_len=2049)
    with pytest.raises(PlanError, match="Block size 31 is not a multiple of 32"):
        options(block_size=31)
    with pytest.raises(PlanError, match="give at least 64 blocks"):
        options(num_blocks=63)
