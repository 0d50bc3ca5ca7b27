"""`run_demo` on an engine without a model: what it asks for, and what it makes of the answers."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from structlog.testing import capture_logs

from api.demo import run_demo
from api.engine.options import EngineOptions
from api.errors import OptionError
from api.messages.engine import AddRequest, DraftCounts, EngineMetrics, EngineState
from api.settings.engine import EngineSettings
from api.text.tokenizer import TextTokenizer
from tests import ROOT
from tests.support.command_line import VARIABLES
from tests.support.demo_figures import MTP_STATISTICS, TT_METAL_STATISTICS, metrics
from tests.support.fake_engine import FakeEngine, Script
from weights.sample import SAMPLE_DIR

EOS = 1


class DemoEngine(FakeEngine):
    """The engine of every run of a test; each request gets what `script` says."""

    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self.options: list[EngineOptions] = []

    @asynccontextmanager
    async def start(
        self, options: EngineOptions, on_state: Callable[[EngineState], None]
    ) -> AsyncIterator["DemoEngine"]:
        self.options.append(options)
        on_state(self.state)
        yield self

    async def wait_ready(self, timeout_s: float) -> None:
        assert timeout_s > 0

    async def metrics(self) -> EngineMetrics:
        count = self.options[-1].pipeline.stage.drafts.num_speculative_tokens
        drafts = DraftCounts(num_speculative_tokens=count, drafts=4, draft_tokens=4 * count, accepted_tokens=3)
        return metrics(6.0, 8.0, 4.0, drafts=drafts)

    @property
    def requests(self) -> list[AddRequest]:
        return [stream.request for stream in self.streams]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> DemoEngine:
    """An engine that says 10, 11, ...; no variable is set but that of the cache."""
    engine = DemoEngine(lambda request: range(10, 10 + request.max_tokens))
    monkeypatch.setattr("api.demo.run.EngineClient", engine)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DEEPSEEK_V3_CACHE", str(tmp_path / "cache"))
    return engine


def reference_file(path: Path, count: int, **more: torch.Tensor) -> Path:
    torch.save({"reference_tokens": torch.arange(100, 100 + count)[None], **more}, path)
    return path


def test_prompts_are_completed_as_they_are(engine: DemoEngine) -> None:
    results = run_demo(["Write a haiku about hardware", "b"], max_new_tokens=3)
    tokenizer = TextTokenizer.load(SAMPLE_DIR)
    assert [request.tokens for request in engine.requests] == [
        tokenizer.encode("Write a haiku about hardware"),
        tokenizer.encode("b"),
    ]
    assert results["generations"] == [{"tokens": [10, 11, 12], "text": tokenizer.decode([10, 11, 12])}] * 2
    assert all(request.sampling.temperature == 0 for request in engine.requests)
    assert run_demo("b", max_new_tokens=3)["generations"] == results["generations"][1:]


def test_a_completion_has_32_tokens_unless_told_otherwise(engine: DemoEngine) -> None:
    [generation] = run_demo(["a"])["generations"]
    assert generation["tokens"] == list(range(10, 42))


def test_a_completion_ends_before_eos_unless_told_otherwise(engine: DemoEngine) -> None:
    engine.script = lambda _: [10, 11, EOS, 12, 13]
    [stopped] = run_demo(["a"], max_new_tokens=5)["generations"]
    [whole] = run_demo(["a"], max_new_tokens=5, stop_at_eos=False)["generations"]
    assert stopped["tokens"] == [10, 11]
    assert whole["tokens"] == [10, 11, EOS, 12, 13]


def test_sampling_is_that_of_the_options_and_every_prompt_draws_for_itself(engine: DemoEngine) -> None:
    run_demo(["a", "a"], sampling_temperature=0.5, sampling_top_k=4, sampling_top_p=0.9)
    sampling = [request.sampling for request in engine.requests]
    assert [(told.temperature, told.top_k, told.top_p) for told in sampling] == [(0.5, 4, 0.9)] * 2
    assert sampling[0].choice != sampling[1].choice


def test_of_repeated_batches_all_are_measured_and_the_last_is_told(engine: DemoEngine) -> None:
    engine.script = lambda _: [10 + len(engine.streams)]
    results = run_demo(["a", "b"], max_new_tokens=1, repeat_batches=3)
    assert [generation["tokens"] for generation in results["generations"]] == [[14], [15]]
    first = [request.tokens for request in engine.requests[:2]]
    assert [request.tokens for request in engine.requests] == first * 3
    assert results["statistics"]["prefill_time_to_token"] == 6.0 / 6


def test_logs_do_not_mix_with_the_text(engine: DemoEngine, capsys: pytest.CaptureFixture[str]) -> None:
    structlog.reset_defaults()
    try:
        settings = EngineSettings.of(cache_dir=Path("cache"), block_size=64, prefill_chunk=100)
        results = run_demo(["San Francisco is a"], engine=settings, early_print_first_user=True)
    finally:
        structlog.reset_defaults()
    printed = capsys.readouterr()
    assert printed.out == results["generations"][0]["text"]
    assert "--max-num-batched-tokens was rounded up to whole blocks" in printed.err


def test_the_first_prompts_text_is_printed_as_it_comes(engine: DemoEngine, capsys: pytest.CaptureFixture[str]) -> None:
    with capture_logs():
        results = run_demo(["a", "b"], max_new_tokens=6, early_print_first_user=True)
    assert capsys.readouterr().out == results["generations"][0]["text"]


def test_statistics_have_the_tt_metal_demos_keys_and_all_are_in_the_docs(engine: DemoEngine) -> None:
    told = run_demo(["a"], mtp="on")["statistics"]
    assert set(told) >= TT_METAL_STATISTICS | MTP_STATISTICS
    docs = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    assert [key for key in told if f"`{key}`" not in docs and f"`_{key.rpartition('_')[2]}`" not in docs] == []


def test_the_models_own_layer_drafts_a_token_where_mtp_is_on(engine: DemoEngine) -> None:
    """Tokens that come together make the same completion as one after the other."""
    off = run_demo(["a", "b"], max_new_tokens=7)
    engine.together = 2
    on = run_demo(["a", "b"], max_new_tokens=7, enable_mtp=True)
    run_demo(["a"], mtp="on", engine=EngineSettings.of(speculative_config='{"num_speculative_tokens": 3}'))
    run_demo(["a"], engine=EngineSettings.of(num_speculative_tokens=2))
    run_demo(["a"], enable_mtp=False)
    told = [options.pipeline.stage.drafts.num_speculative_tokens for options in engine.options]
    assert told == [0, 1, 3, 2, 0]
    assert on["generations"] == off["generations"]
    assert [on["statistics"][name] for name in ("mtp_verifies", "mtp_accepts", "mtp_accept_rate")] == [4, 3, 0.75]
    assert not MTP_STATISTICS & set(off["statistics"])
    assert (off["model_params"]["num_speculative_tokens"], on["model_params"]["num_speculative_tokens"]) == (0, 1)


def test_eos_within_an_output_ends_the_completion(engine: DemoEngine) -> None:
    engine.script, engine.together = lambda _: [10, 11, 12, EOS, 13], 3
    [stopped] = run_demo(["a"], max_new_tokens=5, mtp="on")["generations"]
    assert stopped["tokens"] == [10, 11, 12]


def test_nothing_is_drafted_where_a_reference_is_followed(engine: DemoEngine, tmp_path: Path) -> None:
    run_demo(None, token_accuracy=True, reference_file=reference_file(tmp_path / "r", 20), mtp="on")
    assert engine.options[0].pipeline.stage.drafts.num_speculative_tokens == 0


def test_a_log_of_results_goes_on_with_drafts_or_without(engine: DemoEngine, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    run_demo(["a"], checkpoint_jsonl=log)
    run_demo(["a"], checkpoint_jsonl=log, mtp="on")
    assert len(engine.options) == 1


def test_references_are_followed_from_their_middle_to_their_ends(engine: DemoEngine, tmp_path: Path) -> None:
    """The first file has best tokens, which the engine's every second answer is among; the second has none."""
    best = torch.arange(100).view(20, 5)
    best[11::2, 3] = torch.arange(10, 19)[::2]
    engine.script = lambda request: list(range(10, 10 + request.max_tokens))
    files = [
        reference_file(tmp_path / "a", 20, top5_tokens=best),
        reference_file(tmp_path / "b", 7),
    ]
    results = run_demo(None, token_accuracy=True, reference_file=files, max_new_tokens=500)
    first, second = engine.requests
    assert (first.tokens, first.forced) == (list(range(100, 111)), list(range(111, 120)))
    assert (second.tokens, second.forced) == (list(range(100, 104)), list(range(104, 107)))
    with_best, without = results["generations"]
    assert with_best["predicted_tokens"] == list(range(10, 19))
    assert (with_best["accuracy_top1"], with_best["accuracy_top5"]) == (0.0, 5 / 9)
    assert without["accuracy_top1"] == 0.0
    assert "accuracy_top5" not in without


def test_a_references_prompt_may_be_shorter_and_fewer_tokens_followed(engine: DemoEngine, tmp_path: Path) -> None:
    file = reference_file(tmp_path / "r", 20)
    run_demo(None, token_accuracy=True, reference_file=file, tf_prompt_len=5, max_new_tokens=4)
    [request] = engine.requests
    assert (request.tokens, request.forced) == (list(range(100, 105)), list(range(105, 109)))


def test_nothing_runs_where_all_prompts_are_logged(engine: DemoEngine, tmp_path: Path) -> None:
    """Paths may be strings, as users of the tt-metal demo give them."""
    log = str(tmp_path / "log.jsonl")
    first = run_demo(["a", "b"], checkpoint_jsonl=log)
    again = run_demo(["a", "b"], checkpoint_jsonl=log)
    assert again["generations"] == first["generations"]
    assert len(engine.options) == 1
    run_demo(["a", "b"], checkpoint_jsonl=log, max_new_tokens=5)
    assert len(engine.options) == 2


def test_the_environment_names_the_model_and_the_cache(
    engine: DemoEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r1").symlink_to(SAMPLE_DIR)
    run_demo(["a"], cache_dir=tmp_path / "mine")
    monkeypatch.setenv("DEEPSEEK_V3_HF_MODEL", str(tmp_path / "r1"))
    run_demo(["a"])
    run_demo(["a"], model_path=SAMPLE_DIR)
    stages = [options.pipeline.stage for options in engine.options]
    assert [stage.model_path for stage in stages] == [str(SAMPLE_DIR), str(tmp_path / "r1"), str(SAMPLE_DIR)]
    assert [Path(stage.cache_dir).name for stage in stages] == ["mine", "cache", "cache"]


def test_some_options_are_the_engines(engine: DemoEngine, tmp_path: Path) -> None:
    run_demo(["a"], enable_trace=True, max_seq_len=128)
    run_demo(["a"], max_seq_len=64, engine=EngineSettings.of(cache_dir=tmp_path / "other", block_size=64))
    first, second = [options.pipeline.stage for options in engine.options]
    assert (first.execution.enable_trace, first.cache.max_model_len, first.cache_dir) == (
        True,
        128,
        str(tmp_path / "cache"),
    )
    assert (second.execution.enable_trace, second.cache.max_model_len, second.cache.block_size) == (False, 64, 64)
    assert second.cache_dir == str(tmp_path / "other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generator": "tp"}, "generator"),
        ({"max_new_token": 5}, "max_new_token"),
        ({"max_new_tokens": "5"}, "max_new_tokens"),
        ({"sampling_temperature": -1}, "sampling_temperature"),
        ({"sampling_top_p": 0}, "sampling_top_p"),
        ({"override_num_layers": 0}, "override_num_layers"),
        ({"checkpoint_jsonl": 5}, "checkpoint_jsonl"),
        ({"max_seq_len": "5"}, "max_model_len"),
    ],
)
def test_an_option_that_is_none_is_refused(options: dict[str, Any], message: str, engine: DemoEngine) -> None:
    with pytest.raises(OptionError, match=message):
        run_demo(["a"], **options)
    assert engine.options == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mtp": "auto"}, "mtp"),
        ({"mtp": "off", "engine": EngineSettings.of(num_speculative_tokens=2)}, "--mtp off drafts nothing, and"),
        ({"mtp": "on", "override_num_layers": 2}, "last of the model's 6 layers, and 2 of them are to run"),
        ({"mtp": "on", "random_weights": True}, "1 of them are to run: leave out --mtp on"),
    ],
)
def test_drafts_that_cannot_be_made_are_one_sentence(options: dict[str, Any], message: str, engine: DemoEngine) -> None:
    with pytest.raises(OptionError, match=message):
        run_demo(["a"], **options)
    assert engine.options == []
