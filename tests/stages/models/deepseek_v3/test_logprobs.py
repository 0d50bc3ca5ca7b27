"""Log-probabilities that stages give for prompts and answers, against those of transformers' DeepSeek-V3."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from stages.models.deepseek_v3.lm_head import LMHead
from stages.step import VOCABULARY, SamplingParams, TokenLogprobs
from tests.support.checkpoints import reference_model, write_checkpoint
from tests.support.model_errors import TINY, prompts, reference_logits
from tests.support.stage_driver import Driver, cache_options, stage_options
from weights.sample import SAMPLE_DIR

TOLERANCE = 1e-4
SIZE = TINY["vocab_size"]

Load = Callable[..., Driver]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    overrides = {**TINY, "n_routed_experts": 32, "num_attention_heads": 8}
    return write_checkpoint(tmp_path_factory.mktemp("logprobs") / "model", overrides=overrides)


@pytest.fixture(scope="module")
def reference(model: Path) -> DeepseekV3ForCausalLM:
    return reference_model(model)


@pytest.fixture(scope="module")
def weight_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture
def load(weight_cache: Path) -> Iterator[Load]:
    drivers = []

    def loaded(model: Path, stages: int = 1, mesh_shape: tuple[int, int] | None = None, **options: Any) -> Driver:
        drivers.append(Driver.load(stage_options(model, weight_cache, **options), stages, mesh_shape))
        return drivers[-1]

    yield loaded
    for driver in drivers:
        driver.close()


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "choice": 0, **options})


def expected_logprobs(reference: DeepseekV3ForCausalLM, tokens: list[int]) -> torch.Tensor:
    """[tokens, vocabulary]; row p has those of the token at position p + 1."""
    return reference_logits(reference, tokens).double().log_softmax(dim=-1)


def assert_scores(entry: TokenLogprobs, token: int, top: int, expected: torch.Tensor) -> None:
    """Checks the entry of `token` with the `top` best ones against the reference's log-probabilities [vocabulary]."""
    own = float(expected[token])
    assert abs(entry.logprob - own) < TOLERANCE
    assert int((expected > own + TOLERANCE).sum()) < entry.rank <= int((expected >= own - TOLERANCE).sum())
    best = expected.sort(descending=True).values[: None if top == VOCABULARY else top]
    assert len(set(entry.top_tokens)) == len(entry.top_tokens) == len(best)
    logprobs = torch.tensor(entry.top_logprobs, dtype=torch.float64)
    torch.testing.assert_close(logprobs, best, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(logprobs, expected[entry.top_tokens], rtol=0, atol=TOLERANCE)


def scores_of_prompts(
    driver: Driver, texts: Mapping[int, list[int]], chosen: Mapping[int, SamplingParams], chunk: int
) -> dict[int, list[TokenLogprobs]]:
    """Prefills all slots at once, `chunk` tokens of each a step; returns the entries that are asked for."""
    for slot, text in texts.items():
        driver.admit(slot, chosen[slot], text)
    scores: dict[int, list[TokenLogprobs]] = {slot: [] for slot in texts}
    for start in range(0, max(map(len, texts.values())), chunk):
        parts = {slot: text[start : start + chunk] for slot, text in texts.items() if start < len(text)}
        segments = [
            driver.segment(slot, start, part, sample=start + chunk >= len(texts[slot])) for slot, part in parts.items()
        ]
        asking = [slot for slot in parts if chosen[slot].prompt_logprobs is not None]
        result = driver.run_bytes("prefill", segments)
        for slot, entries in zip(asking, result.prompt_logprobs, strict=True):
            scores[slot] += entries
    return scores


def assert_prompts_are_scored(
    driver: Driver,
    reference: DeepseekV3ForCausalLM,
    texts: Mapping[int, list[int]],
    asked: Mapping[int, int | None],
    chunk: int,
) -> None:
    chosen = {slot: params(prompt_logprobs=top) for slot, top in asked.items()}
    scores = scores_of_prompts(driver, texts, chosen, chunk)
    for slot, text in texts.items():
        top = asked[slot]
        if top is None:
            assert scores[slot] == []
            continue
        assert len(scores[slot]) == len(text) - 1
        expected = expected_logprobs(reference, text)
        for position, entry in enumerate(scores[slot], start=1):
            assert_scores(entry, text[position], top, expected[position - 1])


@pytest.mark.parametrize(("stages", "chunk"), [(1, 32), (1, 64), (2, 96), (2, 1000)])
def test_prompts_are_scored_chunk_by_chunk(
    stages: int, chunk: int, model: Path, reference: DeepseekV3ForCausalLM, load: Load
) -> None:
    """Lengths on both sides of chunks, among them one token, which has nothing to score."""
    texts = dict(enumerate(prompts(6, SIZE)))
    asked = {0: 3, 1: 0, 2: 5, 3: None, 4: 1, 5: VOCABULARY}
    driver = load(model, stages, cache=cache_options(slots=6))
    assert_prompts_are_scored(driver, reference, texts, asked, chunk)


def test_one_prompt_is_scored(model: Path, reference: DeepseekV3ForCausalLM, load: Load) -> None:
    assert_prompts_are_scored(load(model), reference, {2: prompts(5, SIZE)[4]}, {2: 2}, 64)


@pytest.mark.parametrize("mesh_shape", [(1, 8), (2, 4)])
def test_prompts_are_scored_on_meshes(
    mesh_shape: tuple[int, int], model: Path, reference: DeepseekV3ForCausalLM, load: Load
) -> None:
    driver = load(model, mesh_shape=mesh_shape, cache=cache_options(slots=16, pools=8, max_model_len=128))
    # Two slots of one pool, and others of other rows and columns.
    texts = dict(zip([0, 8, 3, 7, 5], prompts(5, SIZE), strict=True))
    assert_prompts_are_scored(driver, reference, texts, {0: 2, 8: None, 3: 0, 7: 4, 5: VOCABULARY}, 64)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (2, 4)])
def test_few_logits_are_held_at_a_time(
    mesh_shape: tuple[int, int],
    model: Path,
    reference: DeepseekV3ForCausalLM,
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = []
    to_torch = LMHead.to_torch

    def counted(*arguments: Any) -> torch.Tensor:
        logits = to_torch(*arguments)
        rows.append(logits.shape[0])
        return logits

    monkeypatch.setattr(LMHead, "to_torch", counted)
    monkeypatch.setattr("stages.output_head.SCORED_AT_ONCE", 10)
    pools = mesh_shape[0] * mesh_shape[1]
    driver = load(model, mesh_shape=mesh_shape, cache=cache_options(slots=2 * pools, pools=pools, max_model_len=128))
    texts = dict(enumerate(prompts(2, SIZE)))
    assert_prompts_are_scored(driver, reference, texts, {0: 1, 1: 0}, 96)
    assert max(rows) <= 10
    assert sum(rows) >= sum(len(text) - 1 for text in texts.values())


def answers(
    driver: Driver, texts: Mapping[int, list[int]], count: int
) -> tuple[dict[int, list[int]], dict[int, list[TokenLogprobs | None]]]:
    """Samples `count` tokens for each slot, whose requests have been admitted and hold nothing yet."""
    tokens: dict[int, list[int]] = {slot: [] for slot in texts}
    entries: dict[int, list[TokenLogprobs | None]] = {slot: [] for slot in texts}
    for step in range(count):
        segments = [
            driver.segment(slot, len(text) + step - 1, tokens[slot][-1:]) if step else driver.segment(slot, 0, text)
            for slot, text in texts.items()
        ]
        result = driver.run_bytes("decode" if step else "prefill", segments)
        assert not step or result.prompt_logprobs == [], "prompts are scored by prefill steps alone"
        logprobs = result.logprobs or [None] * len(texts)
        for slot, token, entry in zip(texts, result.tokens, logprobs, strict=True):
            tokens[slot].append(token)
            entries[slot].append(entry)
    return tokens, entries


@pytest.mark.parametrize("mesh_shape", [(1, 1), (1, 8)])
@pytest.mark.parametrize("stages", [1, 2])
def test_sampled_tokens_have_the_models_own_log_probabilities(
    stages: int, mesh_shape: tuple[int, int], model: Path, reference: DeepseekV3ForCausalLM, load: Load
) -> None:
    """Log-probabilities are those before sampling options act, whichever token these choose."""
    pools = mesh_shape[0] * mesh_shape[1]
    driver = load(model, stages, mesh_shape, cache=cache_options(slots=4 * pools, pools=pools, max_model_len=128))
    texts = dict(enumerate(prompts(4, SIZE)))
    chosen = {
        0: params(logprobs=0),
        1: params(logprobs=4, temperature=2.0, logit_bias={7: 3.0}, top_p=0.9),
        2: params(temperature=1.0, prompt_logprobs=1),
        3: params(logprobs=VOCABULARY, repetition_penalty=1.5, frequency_penalty=1.0),
    }
    for slot, text in texts.items():
        driver.admit(slot, chosen[slot], text)
    tokens, entries = answers(driver, texts, 4)
    assert entries.pop(2) == [None] * 4
    for slot, of_slot in entries.items():
        expected = expected_logprobs(reference, texts[slot] + tokens[slot])
        for step, entry in enumerate(of_slot):
            top = chosen[slot].logprobs
            assert entry is not None
            assert top is not None
            assert_scores(entry, tokens[slot][step], top, expected[len(texts[slot]) + step - 1])


def test_results_say_nothing_where_nobody_asks(model: Path, load: Load) -> None:
    driver = load(model)
    driver.admit(0)
    assert driver.run_bytes("prefill", [driver.segment(0, 0, [1, 2])]).logprobs == []


CHOOSY: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.7,
    "bad_words": [[3], [5, 6]],
    "min_tokens": 5,
    "stop_token_ids": list(range(0, SIZE, 3)),
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("after", [1, 4])
def test_a_preempted_request_goes_on_as_it_would_have(after: int, temperature: float, model: Path, load: Load) -> None:
    """The request is admitted again, to another slot, with its tokens so far, beside a new request."""
    text = prompts(1, SIZE)[0]
    chosen = params(**CHOOSY, temperature=temperature, seed=14)
    driver = load(model, 2)
    driver.admit(0, chosen, text)
    whole = answers(driver, {0: text}, 9)[0][0]
    assert len({token % 3 == 0 for token in whole}) == 2
    driver.end(0)
    driver.admit(1, chosen, text)
    begun = answers(driver, {1: text}, after)[0][1]
    driver.end(1)
    driver.admit(2, chosen, text + begun, prompt_tokens=len(text))
    driver.admit(3)
    texts = {3: prompts(2, SIZE, seed=5)[1], 2: text + begun}
    rest = answers(driver, texts, 9 - after)[0][2]
    assert begun + rest == whole


def test_an_answer_prefilled_again_is_no_prompt(model: Path, load: Load) -> None:
    driver = load(model)
    text = prompts(1, SIZE)[0]
    driver.admit(0, params(prompt_logprobs=0), text, prompt_tokens=40)
    first = driver.run_bytes("prefill", [driver.segment(0, 0, text[:32], sample=False)])
    second = driver.run_bytes("prefill", [driver.segment(0, 32, text[32:64], sample=False)])
    third = driver.run_bytes("prefill", [driver.segment(0, 64, text[64:])])
    assert [[len(entries) for entries in step.prompt_logprobs] for step in (first, second, third)] == [[32], [7], [0]]


@pytest.mark.parametrize(("stages", "mesh_shape"), [(1, (1, 1)), (3, (1, 1)), (1, (1, 8))])
def test_the_sample_model(stages: int, mesh_shape: tuple[int, int], load: Load) -> None:
    pools = mesh_shape[0] * mesh_shape[1]
    driver = load(SAMPLE_DIR, stages, mesh_shape, cache=cache_options(slots=4 * pools, pools=pools))
    reference = reference_model(SAMPLE_DIR)
    texts = dict(enumerate(prompts(4, reference.config.vocab_size)))
    assert_prompts_are_scored(driver, reference, texts, {0: 5, 1: 0, 2: 1, 3: VOCABULARY}, 64)
