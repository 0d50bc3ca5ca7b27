"""The open requests of an engine, on the front end's side: their outputs, and how much work they are."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import msgspec

from api.errors import EngineError
from api.messages.engine import AddRequest, EngineState, FinishReason, RequestOutput

OUTPUTS_WAITING_MAX = 4096

"""Outputs that may wait for their consumer: a client that reads at all falls less behind."""

TOO_SLOW = f"The client read too slowly: {OUTPUTS_WAITING_MAX} parts of its answer waited for it."


class RequestStream(AsyncIterator[RequestOutput]):
    """The outputs of one request, in order, up to and including the one that has a `finish_reason`.

    It `has_begun` once it has an output, and `was_moved` if it is no longer in the engine that it was given to first.

    It yields no "error" output: it raises EngineError with its sentence instead, also when the engine dies. Closing it,
    or cancelling the task that waits on it, before the last output aborts the request: use `contextlib.aclosing`.
    """

    def __init__(self, request: AddRequest, abort: Callable[[int, FinishReason], None]) -> None:
        """`abort` is called with the request's id and the reason, once at most, and never after the last output."""
        self.request = request
        self.has_begun = False
        self.was_moved = False
        self._abort = abort
        self._outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._is_complete = False
        self._is_over = False

    def push(self, output: RequestOutput) -> None:
        """Appends the next output. If too many wait, it aborts the request: its consumer gets an error at last."""
        self.has_begun = True
        if output.finish_reason is None and self._outputs.qsize() >= OUTPUTS_WAITING_MAX:
            output = msgspec.structs.replace(output, finish_reason="error", error=TOO_SLOW, public=TOO_SLOW)
            self._abort(self.request.request_id, "abort")
        self._is_complete = output.finish_reason is not None
        self._outputs.put_nowait(output)

    def move(self, abort: Callable[[int, FinishReason], None]) -> None:
        """Notes that the request is in another engine from now on, whose `abort` is the one to call."""
        self.was_moved = True
        self._abort = abort

    async def __anext__(self) -> RequestOutput:
        if self._is_over:
            raise StopAsyncIteration
        try:
            output = await self._outputs.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        self._is_over = output.finish_reason is not None
        if output.finish_reason == "error":
            raise EngineError(output.error or "The engine gave no reason.", public=output.public)
        return output

    async def aclose(self, reason: FinishReason = "abort") -> None:
        """Aborts the request unless it has ended; `reason` is "stop" where its text is complete. May be repeated."""
        self._is_over = True
        if not self._is_complete:
            self._is_complete = True
            self._abort(self.request.request_id, reason)


class Load(msgspec.Struct, frozen=True, order=True):
    """The number of open requests of an engine, and the tokens that these have or may get, prompts included.

    Loads are ordered by requests; where these are equal, by tokens.
    """

    requests: int
    tokens: int


def least_loaded(loads: Sequence[Load | None], last: int) -> int | None:
    """The index of the engine that gets the next request; None where no engine takes requests.

    `loads` has None for an engine that takes none. Among equals it is the next one after `last`, the index of the
    engine that got the request before, so that idle engines take turns.
    """
    ready = [index for index, load in enumerate(loads) if load is not None]
    return min(ready, key=lambda index: (loads[index], (index - last - 1) % len(loads)), default=None)


class OpenRequests:
    """The requests that have not ended; `streams` has them by id, for looking up only."""

    def __init__(self) -> None:
        self.streams: dict[int, RequestStream] = {}
        self._tokens = 0

    @property
    def load(self) -> Load:
        """How much work the requests are."""
        return Load(len(self.streams), self._tokens)

    def add_stream(self, stream: RequestStream) -> None:
        """Adds a request. Raises ValueError for an id that is in use."""
        request_id = stream.request.request_id
        if request_id in self.streams:
            raise ValueError(f"Request {request_id} is running already.")
        self.streams[request_id] = stream
        self._tokens += _tokens(stream.request)

    def remove_request(self, request_id: int) -> None:
        """Removes a request that has ended or moved to another engine."""
        self._tokens -= _tokens(self.streams.pop(request_id).request)

    def unanswered(self) -> list[RequestStream]:
        """The requests that have no output yet, in the order of their beginning."""
        return [stream for stream in self.streams.values() if not stream.has_begun]


def _tokens(request: AddRequest) -> int:
    return len(request.tokens) + request.max_tokens


class TokenStream(Protocol):
    """The outputs of one request, up to and including the one that has a `finish_reason`. Raises EngineError."""

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        """Iterates over the outputs."""

    async def aclose(self, reason: FinishReason = "abort") -> None:
        """Aborts the request unless it has ended; `reason` is "stop" where its text is complete. May be repeated."""


class TokenSource(Protocol):
    """An engine, or several, that completes requests once it is ready."""

    @property
    def state(self) -> EngineState:
        """The state now."""

    def next_request_id(self) -> int:
        """Returns the id for the next request."""

    def generate(self, request: AddRequest) -> TokenStream:
        """Begins a request. Raises RequestError if it can never fit, NotReadyError while the pipeline is not ready."""
