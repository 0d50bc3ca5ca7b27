"""The timed device with a published model that is not on disk: times, layers, tokens."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.engine.options import EngineOptions
from api.errors import OptionError
from api.settings.engine import EngineSettings
from api.text.model_source import ModelSource, resolve_config, resolve_model
from api.text.tokenizer import TextTokenizer
from stages.capacity.step_time import StageTimes
from stages.step import Mode, Segment, Step
from stages.tensor_dtypes import WeightDtypes
from stages.timed.stage import CONTEXT_TOKENS, TokenMaker, durations
from tests.support.command_line import refused
from tests.support.plans import r1_config
from weights.presets import PRESETS, preset_directory
from weights.sample import SAMPLE_DIR

R1 = r1_config()
TIMED = ("--device", "timed")


def engine_options(**given_options: Any) -> EngineOptions:
    """The engine's options for R1 on the timed device."""
    made = EngineSettings.of(cache_dir=Path("cache"), device="timed", max_model_len=4096, **given_options)
    return made.engine_options(resolve_config("r1", {}), R1)


def step_of(mode: Mode, segments: list[tuple[int, int]]) -> Step:
    """Makes a step with a segment for each (start, tokens)."""
    made = [
        Segment(slot=slot, start=start, tokens=[1] * tokens, new_blocks=[], sample=True)
        for slot, (start, tokens) in enumerate(segments)
    ]
    return Step(epoch=0, step_id=0, mode=mode, segments=made, admissions=[], ended=[])


@settings(max_examples=15, deadline=None)
@given(
    users=st.integers(1, 64),
    contexts=st.lists(st.integers(0, 4000), min_size=64, max_size=64),
    prompts=st.lists(st.tuples(st.integers(0, 60).map(lambda block: 32 * block), st.integers(1, 256)), min_size=1),
    rows=st.sampled_from([1, 2]),
    traced=st.booleans(),
)
def test_predicted_times_are_those_of_plan(
    users: int, contexts: list[int], prompts: list[tuple[int, int]], rows: int, traced: bool
) -> None:
    pipeline = engine_options(stages=8, rows_per_stage=rows, enable_trace=traced).pipeline
    for spec in (pipeline.specs[0], pipeline.specs[-1]):
        expected = StageTimes(R1, spec, rows, WeightDtypes(), traced=traced)
        stage = durations(R1, spec, pipeline.stage)
        decode = step_of("decode", [(start, 1) for start in contexts[:users]])
        per_row, context = -(-users // rows), max(contexts[:users]) + 1
        seconds = stage.seconds(decode)
        # Contexts are rounded up by less than CONTEXT_TOKENS.
        assert seconds >= expected.decode(per_row, context).total_s
        assert seconds <= expected.decode(per_row, context + CONTEXT_TOKENS - 1).total_s
        chunks = [expected.prefill(tokens, start).total_s for start, tokens in prompts]
        assert stage.seconds(step_of("prefill", prompts)) == pytest.approx(sum(chunks))


def test_predicted_stages_are_split_as_plan_splits_them_and_hold_a_cache_that_fits_chips() -> None:
    predicted = engine_options(stages=8).pipeline
    with pytest.raises(OptionError, match="--dtype float32 is not for chips"):
        engine_options(stages=8, dtype="float32")
    assert [len(spec.layers) for spec in predicted.specs] == [10, 7, 7, 7, 7, 8, 8, 7]
    assert predicted.stage.cache.slots == 32 * 9
    assert predicted.transport == "host"


def test_no_token_that_is_made_ends_a_text_or_is_special() -> None:
    tokenizer = TextTokenizer.load(SAMPLE_DIR)
    timed = engine_options(stages=8).pipeline.stage.timed
    assert timed is not None
    assert set(timed.never) >= {*R1.eos_token_ids, *tokenizer.special_ids}
    assert timed.vocabulary == tokenizer.size
    maker = TokenMaker(timed.vocabulary, timed.never)
    made = {maker.after(token, position) for token in range(50) for position in range(100)}
    assert made <= set(range(tokenizer.size)) - set(timed.never)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_published_models_need_no_directory(name: str) -> None:
    assert resolve_config(name, {}) == ModelSource(
        path=preset_directory(name), name=name, root=name, tokenizer=SAMPLE_DIR
    )
    with pytest.raises(OptionError):
        resolve_model(name, {"HF_HOME": "absent"})


def test_a_published_model_that_is_on_the_disk_is_taken_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {"DEEPSEEK_V3_HF_MODEL": str(tmp_path)}
    assert resolve_config("deepseek-ai/DeepSeek-R1", variables).path == tmp_path
    (tmp_path / "r1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_config("r1", {}) == ModelSource(path=tmp_path / "r1", name="r1", root="r1")


@pytest.mark.parametrize("options", [(), ("--device", "embedded")])
def test_other_devices_do_not_know_published_models(options: tuple[str, ...], tmp_path: Path) -> None:
    assert refused("serve", *options, "--model", "r1") == (
        "Error: Model path does not exist: 'r1'. r1 is a name for `galaxyline plan` and for --device timed, which need "
        "no weights: give the directory of the checkpoint."
    )
    refusal = refused("serve", *options, "--model", "deepseek-ai/DeepSeek-R1", HF_HOME=str(tmp_path))
    assert "the local Hugging Face cache does not hold it" in refusal
    assert refused("serve", *TIMED, "--model", "absent") == (
        "Error: Model path does not exist: 'absent'. Without a directory, galaxyline-sample, r1, v3, v3.1 and the hub "
        "ids of DeepSeek's V3 and R1 models are known."
    )
