"""The front end's metrics of requests, taken as near to the client as the tokens of all of them pass."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from api.messages.engine import AddRequest, FinishReason, RequestOutput
from api.messages.histogram import FIRST_TOKEN_BOUNDS_S, LATENCY_BOUNDS_S, TOKEN_BOUNDS_S, Histogram, one_two_five

CHOICE_BOUNDS = (1, 2, 5, 10, 20)
"""vLLM's bounds for `n`."""


@dataclass(slots=True)
class OpenRequest:
    """One request that has not ended; times are those of the metrics' clock, in seconds."""

    began: float
    prompt_tokens: int
    max_tokens: int
    first_token: float = 0.0
    last_token: float = 0.0
    tokens: int = 0


class RequestMetrics:
    """Adds up over all requests, from the moment they are handed to the engine to the arrival of their tokens."""

    def __init__(self, max_model_len: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds; requests have at most `max_model_len` tokens."""
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: dict[FinishReason, int] = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        self.first_token_times = Histogram.of(FIRST_TOKEN_BOUNDS_S)
        self.inter_token_times = Histogram.of(TOKEN_BOUNDS_S)
        self.latencies = Histogram.of(LATENCY_BOUNDS_S)
        self.prompt_lengths = Histogram.of(one_two_five(max_model_len))
        self.generation_lengths = Histogram.of(one_two_five(max_model_len))
        self.max_tokens = Histogram.of(one_two_five(max_model_len))
        self.times_per_token = Histogram.of(TOKEN_BOUNDS_S)
        self._clock = clock
        self._open: dict[int, OpenRequest] = {}

    def began(self, request: AddRequest) -> None:
        """Notes a request that is sent to the engine."""
        self._open[request.request_id] = OpenRequest(
            began=self._clock(), prompt_tokens=len(request.tokens), max_tokens=request.max_tokens
        )

    def received(self, outputs: Sequence[RequestOutput]) -> None:
        """Counts outputs that came from the engine, but for those of requests that ended before."""
        now = self._clock()
        for output in outputs:
            request = self._open.get(output.request_id)
            if request is None:
                continue
            if output.tokens:
                self._count_tokens(request, len(output.tokens), now)
            if output.finish_reason is not None:
                self._end(output.request_id, output.finish_reason, now)

    def release(self, request_id: int) -> OpenRequest:
        """Removes a request that moves to another engine; its `adopt` takes what is returned."""
        return self._open.pop(request_id)

    def adopt(self, request_id: int, request: OpenRequest) -> None:
        """Adds a request that moved here; its times count from its beginning in the first engine."""
        self._open[request_id] = request

    def ended_here(self, request_id: int, reason: FinishReason) -> None:
        """Notes the end of a request that the front end aborted, or whose text was complete."""
        self._end(request_id, reason, self._clock())

    def _count_tokens(self, request: OpenRequest, count: int, now: float) -> None:
        self.generation_tokens += count
        if request.tokens:
            self.inter_token_times.observe(now - request.last_token)
        else:
            self.prompt_tokens += request.prompt_tokens
            self.first_token_times.observe(now - request.began)
            request.first_token = now
        request.tokens += count
        request.last_token = now

    def _end(self, request_id: int, reason: FinishReason, now: float) -> None:
        request = self._open.pop(request_id)
        self.finished[reason] += 1
        if reason in {"stop", "length"}:
            self.latencies.observe(now - request.began)
            self.prompt_lengths.observe(request.prompt_tokens)
            self.generation_lengths.observe(request.tokens)
            if request.max_tokens:
                self.max_tokens.observe(request.max_tokens)
            if not request.tokens:
                # A prompt that was only scored has no first token to count it by.
                self.prompt_tokens += request.prompt_tokens
            elif request.tokens > 1:
                self.times_per_token.observe((request.last_token - request.first_token) / (request.tokens - 1))


class CompletionMetrics:
    """Adds up over the prompts of all completion requests, each with its `n` completions, whose end was not early."""

    def __init__(self, max_model_len: int = 1) -> None:
        """Requests have at most `max_model_len` tokens."""
        self.choices = Histogram.of(CHOICE_BOUNDS)
        self.longest = Histogram.of(one_two_five(max_model_len))

    def ended(self, generated: Sequence[int]) -> None:
        """Adds a prompt whose completions have so many tokens."""
        self.choices.observe(len(generated))
        self.longest.observe(max(generated))
