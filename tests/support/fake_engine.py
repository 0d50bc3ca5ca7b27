"""An engine without a model: it completes requests with tokens that the test chose."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np

from api.client.open_requests import Load, TokenStream
from api.engine.options import EngineOptions
from api.errors import EngineError
from api.messages.engine import AddRequest, EngineState, FinishReason, RequestOutput
from api.text.model_source import resolve_model
from stages.step import VOCABULARY, TokenLogprobs

SAMPLE = resolve_model(None, {})

Script = Callable[[AddRequest], Sequence[int]]

VOCABULARY_SIZE = 300
PROMPT_CHUNK = 3
"""The positions of a prompt that are scored at once."""


def log_softmax_after(tokens: Sequence[int]) -> list[float]:
    """Returns log-probabilities of the whole vocabulary, seeded by `tokens`; the least one is minus infinity."""
    logits = np.random.default_rng([len(tokens), *tokens]).normal(size=VOCABULARY_SIZE)
    logprobs: list[float] = (logits - np.log(np.exp(logits).sum())).tolist()
    logprobs[logprobs.index(min(logprobs))] = -math.inf
    return logprobs


def scored(before: Sequence[int], token: int, count: int) -> TokenLogprobs:
    """Returns a last stage's scores of `token` after the tokens `before`, with the `count` best ones."""
    logprobs = log_softmax_after(before)
    best = sorted(range(len(logprobs)), key=lambda one: (-logprobs[one], one))
    top = best if count == VOCABULARY else best[:count]
    return TokenLogprobs(
        logprob=logprobs[token],
        rank=best.index(token) + 1,
        top_tokens=top,
        top_logprobs=[logprobs[one] for one in top],
    )


class FakeStream:
    """The stream of one request: its script's tokens, `together` in each output, until `max_tokens` or a stop token.

    The first token comes alone, as a prompt gives no more. A prompt is scored in chunks before the first token, the
    last of them together with it.
    """

    def __init__(
        self, request: AddRequest, tokens: Sequence[int], fail_after: int | None, cached: int, together: int
    ) -> None:
        self.request = request
        self.outputs: asyncio.Queue[RequestOutput | EngineError] = asyncio.Queue()
        self.ended = False
        self.aborted = asyncio.Event()
        self._fail_after = fail_after
        self._cached = cached
        self._given = 0
        self._tokens = list(request.tokens)
        self._prompt_logprobs = self._scored_prompt()
        while len(self._prompt_logprobs) > PROMPT_CHUNK:
            self._put([])
        if request.only_scores:
            self._put([], finish="length")
        coming: list[int] = []
        for count, token in enumerate(tokens[: request.max_tokens], start=1):
            coming.append(token)
            is_stopped = token in request.stop_token_ids
            finish: FinishReason | None = "stop" if is_stopped else "length" if count == request.max_tokens else None
            if finish is not None or count == 1 or len(coming) == together:
                self._put(coming, finish)
                coming = []
            if finish is not None:
                return
        if coming:
            self._put(coming)

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.ended or self.aborted.is_set():
            raise StopAsyncIteration
        if self._given == self._fail_after:
            self.ended = True
            sentence = "Stage 1 on 127.0.0.1 died at step 7"
            raise EngineError(f"{sentence}: /srv/models/x.safetensors has no model.norm.weight", public=f"{sentence}.")
        output = await self.outputs.get()
        if isinstance(output, EngineError):
            self.ended = True
            raise output
        self._given += 1
        self.ended = output.finish_reason is not None
        return output

    async def aclose(self, reason: FinishReason = "abort") -> None:
        if not self.ended:
            self.aborted.set()

    def finish(self, tokens: Sequence[int]) -> None:
        """Gives a waiting request its last tokens."""
        self._put(list(tokens), finish="length")

    def fail(self) -> None:
        """Ends the request with an error, after what it has been given."""
        self.outputs.put_nowait(EngineError.for_clients("The engine was closed."))

    def _scored_prompt(self) -> list[TokenLogprobs]:
        count = self.request.sampling.prompt_logprobs
        tokens = self.request.tokens
        return [] if count is None else [scored(tokens[:end], tokens[end], count) for end in range(1, len(tokens))]

    def _put(self, tokens: list[int], finish: FinishReason | None = None) -> None:
        prompt_logprobs = self._prompt_logprobs[:PROMPT_CHUNK]
        del self._prompt_logprobs[:PROMPT_CHUNK]
        count = self.request.sampling.logprobs
        logprobs: list[TokenLogprobs] = []
        for token in tokens:
            if count is not None:
                logprobs.append(scored(self._tokens, token, count))
            self._tokens.append(token)
        self.outputs.put_nowait(
            RequestOutput(
                request_id=self.request.request_id,
                tokens=tokens,
                finish_reason=finish,
                error=None,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                cached_tokens=self._cached,
            )
        )


class FakeEngine:
    """An engine that answers each request from `script`; one shorter than `max_tokens` leaves the request waiting.

    `cached` tells how many tokens of a request's prompt it finds in its cache. Tokens come `together` in an output, as
    they do where drafts are accepted.
    """

    def __init__(self, script: Script, fail_after: int | None = None) -> None:
        self.state = EngineState(phase="ready", detail="")
        self.streams: list[FakeStream] = []
        self.refusal: Exception | None = None
        self.script = script
        self.cached: Callable[[AddRequest], int] = lambda _: 0
        self.together = 1
        self._fail_after = fail_after
        self._request_id = 0

    def next_request_id(self) -> int:
        self._request_id += 1
        return self._request_id

    def generate(self, request: AddRequest) -> TokenStream:
        if self.refusal is not None:
            raise self.refusal
        tokens = self.script(request)
        stream = FakeStream(request, tokens, self._fail_after, self.cached(request), self.together)
        self.streams.append(stream)
        return stream


class FakeEngineClient(FakeEngine):
    """An engine that becomes ready when `loaded` is set, and whose streams end when it is closed."""

    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self.state = EngineState(phase="loading", detail="Stage 0: loading, 1 of 3 layers")
        self.loaded = asyncio.Event()
        self.failure: Exception | None = None
        self.load = Load(0, 0)
        self.on_state: Callable[[EngineState], None] | None = None
        self.closed = False

    def __call__(self, _: EngineOptions, on_state: Callable[[EngineState], None]) -> "FakeEngineClient":
        self.on_state = on_state
        return self

    async def launch(self) -> None:
        assert self.on_state is not None
        self.on_state(self.state)

    async def wait_ready(self, timeout_s: float) -> None:
        await asyncio.wait_for(self.loaded.wait(), timeout_s)
        if self.failure is not None:
            raise self.failure
        self.state = EngineState(phase="ready", detail="")

    async def wait_failed(self) -> None:
        """Waits for ever, as it does not fail."""
        await asyncio.Event().wait()

    async def probe(self) -> None:
        """Answers at once."""

    def kill(self) -> None:
        """Has no process."""

    async def close(self) -> None:
        self.closed = True
        for stream in self.streams:
            stream.fail()
