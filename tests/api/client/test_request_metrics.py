"""The front end's metrics of requests, by a clock that the test sets."""

import pytest

from api.client.request_metrics import CompletionMetrics, RequestMetrics
from api.messages.engine import AddRequest, FinishReason, RequestOutput
from stages.step import SamplingParams, TokenLogprobs

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0)


class Clock:
    """Seconds."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def request(request_id: int, prompt: int) -> AddRequest:
    return AddRequest(request_id=request_id, tokens=[1] * prompt, max_tokens=9, stop_token_ids=[], sampling=GREEDY)


def output(request_id: int, tokens: int = 1, finish: FinishReason | None = None) -> RequestOutput:
    return RequestOutput(request_id=request_id, tokens=[5] * tokens, finish_reason=finish, error=None)


def test_times_run_from_the_request_to_each_of_its_tokens() -> None:
    clock = Clock()
    metrics = RequestMetrics(256, clock)
    metrics.began(request(0, prompt=10))
    clock.now = 51.0
    metrics.began(request(1, prompt=4))
    clock.now = 53.0
    metrics.received([output(0), output(1)])
    clock.now = 53.5
    metrics.received([output(0)])
    clock.now = 57.0
    metrics.received([output(1, finish="length"), output(0, finish="stop")])
    assert (metrics.prompt_tokens, metrics.generation_tokens) == (14, 5)
    assert metrics.finished == {"stop": 1, "length": 1, "abort": 0, "error": 0}
    assert (sum(metrics.first_token_times.counts), metrics.first_token_times.total) == (2, 3.0 + 2.0)
    assert (sum(metrics.inter_token_times.counts), metrics.inter_token_times.total) == (3, 0.5 + 3.5 + 4.0)
    assert (sum(metrics.latencies.counts), metrics.latencies.total) == (2, 7.0 + 6.0)
    assert (sum(metrics.prompt_lengths.counts), metrics.prompt_lengths.total) == (2, 14)
    assert (sum(metrics.generation_lengths.counts), metrics.generation_lengths.total) == (2, 5)


def test_tokens_that_come_together_are_all_counted_and_have_one_latency() -> None:
    clock = Clock()
    metrics = RequestMetrics(256, clock)
    metrics.began(request(0, prompt=10))
    for now, tokens in ((51.0, 1), (53.0, 3), (54.0, 1)):
        clock.now = now
        metrics.received([output(0, tokens)])
    clock.now = 58.0
    metrics.received([output(0, 2, "stop")])
    assert metrics.generation_tokens == metrics.generation_lengths.total == 7
    assert (sum(metrics.inter_token_times.counts), metrics.inter_token_times.total) == (3, 2.0 + 1.0 + 4.0)
    assert (sum(metrics.first_token_times.counts), metrics.first_token_times.total) == (1, 1.0)
    assert sum(metrics.times_per_token.counts) == 1
    assert metrics.times_per_token.total == pytest.approx(7.0 / 6)


def test_scores_of_a_prompt_are_no_first_token() -> None:
    clock = Clock()
    metrics = RequestMetrics(256, clock)
    metrics.began(request(0, prompt=10))
    scores = [TokenLogprobs(logprob=-1.0, rank=1, top_tokens=[], top_logprobs=[])]
    clock.now = 51.0
    metrics.received([RequestOutput(request_id=0, tokens=[], finish_reason=None, error=None, prompt_logprobs=scores)])
    assert (metrics.prompt_tokens, sum(metrics.first_token_times.counts)) == (0, 0)
    clock.now = 54.0
    metrics.received([output(0)])
    assert (metrics.prompt_tokens, metrics.first_token_times.total) == (10, 4.0)


@pytest.mark.parametrize(("reason", "lengths"), [("abort", 0), ("error", 0), ("stop", 1)])
def test_only_completed_requests_count_for_latency_and_length(reason: FinishReason, lengths: int) -> None:
    metrics = RequestMetrics(256, Clock())
    metrics.began(request(0, prompt=10))
    metrics.received([output(0)])
    metrics.ended_here(0, reason)
    metrics.received([output(0, finish="length")])  # It was on its way.
    assert metrics.finished == {**dict.fromkeys(("stop", "length", "abort", "error"), 0), reason: 1}
    for histogram in (metrics.latencies, metrics.prompt_lengths, metrics.generation_lengths):
        assert sum(histogram.counts) == lengths
    assert metrics.generation_tokens == 1


def test_what_dashboards_of_vllm_ask_for_besides() -> None:
    clock = Clock()
    metrics = RequestMetrics(256, clock)
    for request_id in range(3):
        metrics.began(request(request_id, prompt=10))
    clock.now = 51.0
    metrics.received([output(0), output(1, finish="stop")])
    clock.now = 55.0
    metrics.received([output(0, tokens=2)])
    clock.now = 57.0
    metrics.received([output(0, finish="length"), output(2, finish="error")])
    # Three tokens after the first one came in 6 s; a single token has none after it.
    assert (sum(metrics.times_per_token.counts), metrics.times_per_token.total) == (1, 2.0)
    assert (sum(metrics.max_tokens.counts), metrics.max_tokens.total) == (2, 18)


def test_a_prompt_that_is_only_scored_is_counted_at_its_end() -> None:
    metrics = RequestMetrics(256, Clock())
    metrics.began(AddRequest(request_id=0, tokens=[1] * 7, max_tokens=0, stop_token_ids=[], sampling=GREEDY))
    metrics.received([output(0, tokens=0, finish="length")])
    assert (metrics.prompt_tokens, metrics.generation_tokens, metrics.finished["length"]) == (7, 0, 1)
    assert sum(metrics.max_tokens.counts) == sum(metrics.times_per_token.counts) == 0


def test_the_completions_of_a_prompt_are_counted_together() -> None:
    metrics = CompletionMetrics(256)
    metrics.ended([3, 40, 5])
    metrics.ended([7])
    assert (sum(metrics.choices.counts), metrics.choices.total) == (2, 4)
    assert (sum(metrics.longest.counts), metrics.longest.total) == (2, 47)
