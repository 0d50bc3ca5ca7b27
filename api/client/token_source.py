"""The interface of an engine that the front end needs: `Replicas` and `EngineClient` have it."""

from collections.abc import AsyncIterator
from typing import Protocol

from api.messages.engine import AddRequest, EngineState, FinishReason, RequestOutput


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
