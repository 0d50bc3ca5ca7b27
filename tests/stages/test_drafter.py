"""Drafts of the last stage: what they are, and that they change no token of any request on any mesh."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.options import DraftOptions
from stages.step import NO_TOKEN, SamplingParams
from tests.support.checkpoints import write_checkpoint
from tests.support.drafted_requests import DraftedRequests
from tests.support.model_errors import prompts
from tests.support.stage_driver import Driver, cache_options, stage_options

pytestmark = pytest.mark.usefixtures("float32")

MODEL: dict[str, Any] = {"vocab_size": 320, "num_hidden_layers": 2}
VOCABULARY = MODEL["vocab_size"]
LENGTH = 20
FEW = [7, 30, 31, 250]
"""The model has learned nothing, and drafts of it are right by chance alone: which is often where tokens are few."""


def sampling(**changes: Any) -> SamplingParams:
    return SamplingParams(
        **{"temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "choice": 0, "allowed_token_ids": FEW, **changes}
    )


SAMPLINGS = [
    sampling(logprobs=2),
    sampling(temperature=0.7, seed=3, allowed_token_ids=[], top_p=0.9),
    sampling(temperature=1.5, seed=4, choice=1, allowed_token_ids=[]),
    sampling(repetition_penalty=1.3, presence_penalty=0.6, frequency_penalty=0.2),
    sampling(temperature=1.5, seed=5, bad_words=[[7, 7], [30, 31]], min_tokens=9, stop_token_ids=[250]),
    sampling(),
]
"""The prompts of as many requests are from 1 to 97 tokens, on both sides of borders of blocks."""

Load = Callable[..., DraftedRequests]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), overrides=MODEL, mtp_layer=True)


@pytest.fixture(scope="module")
def weight_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture
def load(model: Path, weight_cache: Path) -> Iterator[Load]:
    """Loads stages onto meshes, which are closed at the end."""
    drivers: list[Driver] = []

    def loaded(
        drafts: int,
        *,
        stages: int = 1,
        mesh_shape: tuple[int, int] = (1, 1),
        path: Path = model,
        enable_trace: bool = False,
    ) -> DraftedRequests:
        pools = mesh_shape[0] * mesh_shape[1]
        options = stage_options(
            path,
            weight_cache / path.name,
            cache=cache_options(slots=max(8, 2 * pools), pools=pools, max_model_len=160),
            drafts=DraftOptions(num_speculative_tokens=drafts),
            enable_trace=enable_trace,
        )
        drivers.append(Driver.load(options, stages, mesh_shape))
        return DraftedRequests(drivers[-1])

    yield loaded
    for driver in drivers:
        driver.close()


def slots_on(mesh_shape: tuple[int, int]) -> list[int]:
    """A slot for each request: some in one pool, others on another chip and row."""
    pools = mesh_shape[0] * mesh_shape[1]
    return list(range(len(SAMPLINGS))) if pools == 1 else [0, pools, pools - 1, 2 * pools - 1, 3, pools // 2]


def run(requests: DraftedRequests, slots: list[int], drafts: int, chunk: int = 64) -> dict[int, list[int]]:
    """The answers of all requests, in their order."""
    texts = dict(zip(slots, prompts(len(slots), VOCABULARY), strict=True))
    requests.prefill(texts, dict(zip(slots, SAMPLINGS, strict=True)), drafts=drafts, chunk=chunk)
    answers = requests.decode_until(LENGTH, slots, drafts)
    return {number: answers[slot] for number, slot in enumerate(slots)}


@pytest.fixture(scope="module")
def without_drafts(model: Path, weight_cache: Path) -> DraftedRequests:
    """Requests that have been answered without drafts, on one chip."""
    options = stage_options(model, weight_cache / "plain", cache=cache_options(slots=8, max_model_len=160))
    requests = DraftedRequests(Driver.load(options))
    run(requests, slots_on((1, 1)), 0)
    requests.driver.close()
    return requests


@pytest.mark.parametrize(
    ("mesh_shape", "drafts", "stages", "enable_trace"),
    [
        ((1, 1), 1, 1, False),
        ((1, 1), 2, 2, True),
        ((1, 1), 3, 1, True),
        ((1, 8), 1, 2, True),
        ((1, 8), 2, 1, True),
        ((1, 8), 3, 2, False),
        ((2, 8), 1, 2, False),
        ((2, 8), 2, 2, False),
        ((2, 8), 3, 1, True),
    ],
)
def test_tokens_are_those_without_drafts(
    mesh_shape: tuple[int, int],
    drafts: int,
    stages: int,
    enable_trace: bool,
    load: Load,
    without_drafts: DraftedRequests,
) -> None:
    requests = load(drafts, stages=stages, mesh_shape=mesh_shape, enable_trace=enable_trace)
    slots = slots_on(mesh_shape)
    found = run(requests, slots, drafts)
    assert found == {number: without_drafts.by_slot[number].answer for number in range(len(slots))}
    for slot in slots:
        steps = requests.by_slot[slot].steps
        assert {made for made, _ in steps} == {drafts}
        assert any(right for _, right in steps)
        assert any(right < made for made, right in steps)
    if drafts > 1:
        assert any(0 < right < made for slot in slots for made, right in requests.by_slot[slot].steps)
    logprobs, expected = requests.by_slot[slots[0]].logprobs, without_drafts.by_slot[0].logprobs
    for own, other in zip(logprobs, expected, strict=False):
        assert (own.rank, own.top_tokens) == (other.rank, other.top_tokens)
        assert own.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert own.top_logprobs == pytest.approx(other.top_logprobs, abs=1e-4)
    assert min(len(logprobs), len(expected)) >= LENGTH


@pytest.mark.parametrize("mesh_shape", [(1, 1), (1, 8)])
def test_drafts_follow_from_the_tokens_alone(mesh_shape: tuple[int, int], load: Load) -> None:
    """After prompts in chunks, and after drafts that were right or wrong, they are those of the tokens in one piece."""
    requests = load(3, mesh_shape=mesh_shape)
    slots = slots_on(mesh_shape)
    texts = dict(zip(slots, prompts(len(slots), VOCABULARY), strict=True))
    samplings = dict(zip(slots, SAMPLINGS, strict=True))
    requests.prefill(texts, samplings, drafts=3, chunk=32)
    seen = [{slot: (len(request.answer), request.drafts) for slot, request in requests.by_slot.items()}]
    for _ in range(8):
        requests.decode(dict.fromkeys(slots, 3))
        seen.append({slot: (len(request.answer), request.drafts) for slot, request in requests.by_slot.items()})
    made, right = requests.verified()
    assert 0.1 < right / made < 0.9

    known = {slot: request.tokens for slot, request in requests.by_slot.items()}
    for state in seen:
        for slot in slots:
            requests.end(slot)
            # All but the latest token, as after a preemption.
            answered, drafts = state[slot]
            tokens = known[slot][: len(texts[slot]) + answered]
            requests.prefill({slot: tokens[:-1]}, {slot: samplings[slot]}, drafts=3, answered=answered - 1)
            assert requests.by_slot[slot].tokens == tokens
            assert requests.by_slot[slot].drafts == drafts


def test_requests_with_and_without_drafts_share_steps(load: Load, without_drafts: DraftedRequests) -> None:
    """Each asks for another number of them in each step, and uses the layer at times only."""
    requests = load(3, stages=2)
    slots = slots_on((1, 1))
    texts = dict(zip(slots, prompts(len(slots), VOCABULARY), strict=True))
    samplings = dict(zip(slots, SAMPLINGS, strict=True))
    for slot in slots:
        requests.prefill({slot: texts[slot]}, samplings, drafts=slot % 3, chunk=32)
    for step in range(LENGTH):
        asked = {slot: (step + slot) % 4 for slot in slots if step % 5 != slot}
        result = requests.decode(asked)
        assert [len(drafts) for drafts in result.drafts] == list(asked.values())
    for slot in slots:
        request = requests.by_slot[slot]
        assert {made for made, _ in request.steps} == {0, 1, 2, 3}
        count = min(len(request.answer), LENGTH)
        assert count > LENGTH // 2
        assert request.answer[:count] == without_drafts.by_slot[slot].answer[:count]
    made, right = requests.verified()
    assert 0.1 < right / made < 0.9


def test_no_drafts_where_none_are_asked_for(load: Load) -> None:
    requests = load(2)
    result = requests.prefill({0: prompts(1, VOCABULARY)[0]}, drafts=0)
    assert (result.accepted, result.drafts) == ([], [])
    result = requests.decode({0: 0})
    assert (result.accepted, result.drafts) == ([], [])


def test_a_prompt_behind_cached_blocks(load: Load, without_drafts: DraftedRequests) -> None:
    """The draft layer's entry at the end of a shared block was made for the other request's next token."""
    requests = load(2, stages=2)
    [text] = prompts(5, VOCABULARY)[4:]
    other = [*text[:64], (text[64] + 1) % VOCABULARY, 5, 6]
    requests.prefill({0: other}, drafts=2)
    shared = requests.driver.blocks(0)[:2]
    requests.prefill({4: text}, {4: SAMPLINGS[4]}, drafts=2, cached=shared)
    answers = requests.decode_until(LENGTH, [4], 2)
    assert answers[4] == without_drafts.by_slot[4].answer[:LENGTH]
    assert any(right for _, right in requests.by_slot[4].steps)


def test_another_request_takes_the_slot(load: Load, without_drafts: DraftedRequests) -> None:
    """Its drafts rest on nothing that the former one has left."""
    requests = load(3)
    texts = prompts(len(SAMPLINGS), VOCABULARY)
    for number in (3, 0, 5):
        requests.prefill({2: texts[number]}, {2: SAMPLINGS[number]}, drafts=3)
        assert requests.decode_until(LENGTH, [2], 3)[2] == without_drafts.by_slot[number].answer[:LENGTH]
        requests.end(2)


def with_tensor(model: Path, path: Path, name: str, row: int | None) -> Path:
    """A copy of the model, with what is not a number in a tensor or in one row of it."""
    path.mkdir()
    (path / "config.json").write_bytes((model / "config.json").read_bytes())
    tensors = load_file(model / "model.safetensors")
    if row is None:
        tensors[name][:] = torch.nan
    else:
        tensors[name][row] = torch.nan
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_token_that_breaks_the_model_ends_its_request_alone(
    model: Path, tmp_path: Path, load: Load, without_drafts: DraftedRequests
) -> None:
    """It is sampled after one prompt, and drafted after another."""
    broken = 9
    path = with_tensor(model, tmp_path / "broken", "model.embed_tokens.weight", broken)
    requests = load(3, path=path)
    texts = prompts(4, VOCABULARY)
    assert not any(broken in text for text in texts)
    requests.prefill({3: texts[3]}, {3: SAMPLINGS[3]}, drafts=3)
    requests.prefill({0: texts[0]}, {0: sampling(allowed_token_ids=[broken])}, drafts=3)
    assert requests.by_slot[0].answer == [broken]
    assert requests.by_slot[0].drafts == []
    result = requests.decode({3: 3, 0: 3})
    assert result.tokens[-1] == NO_TOKEN
    assert result.drafts[-1] == []
    requests.end(0)
    seven_first = {"min_tokens": 1, "stop_token_ids": [broken], "bad_words": [[7, 7]]}
    forced = sampling(allowed_token_ids=[7, broken], **seven_first)
    requests.prefill({1: texts[1]}, {1: forced}, drafts=1)
    assert requests.by_slot[1].answer == [7]
    assert requests.by_slot[1].drafts == [broken]
    result = requests.decode({1: 1, 3: 3})
    # What is added to the cache for the draft may break the token before it as well.
    assert result.tokens[result.accepted[0]] == NO_TOKEN
    assert result.drafts[0] == []
    requests.end(1)
    assert requests.decode_until(LENGTH, [3], 3)[3] == without_drafts.by_slot[3].answer[:LENGTH]


def test_a_draft_layer_whose_values_are_not_numbers_drafts_nothing(
    model: Path, tmp_path: Path, load: Load, without_drafts: DraftedRequests
) -> None:
    layer = MODEL["num_hidden_layers"]
    path = with_tensor(model, tmp_path / "broken", f"model.layers.{layer}.hnorm.weight", None)
    requests = load(2, path=path)
    slots = slots_on((1, 1))
    found = run(requests, slots, 2)
    assert found == {number: without_drafts.by_slot[number].answer for number in range(len(slots))}
    assert requests.verified() == (0, 0)
