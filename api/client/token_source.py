"""What the front end needs of an engine; `EngineClient` is the one that serves."""

from collections.abc import AsyncIterator
from typing import Protocol

from api.messages.engine import AddRequest, EngineState, FinishReason, RequestOutput


class TokenStream(Protocol):
    """The outputs of one request, up to and with the one that has a `finish_reason`. Raises EngineError."""

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        """Itself."""

    async def aclose(self, reason: FinishReason = "abort") -> None:
        """Aborts the request unless it has ended: "stop" where its text is complete. May be repeated."""


class TokenSource(Protocol):
    """Completes requests, once it is ready."""

    @property
    def state(self) -> EngineState:
        """Where it stands now."""

    def next_request_id(self) -> int:
        """An id for the next request."""

    def generate(self, request: AddRequest) -> TokenStream:
        """Begins a request. Raises RequestError if it can never fit, NotReadyError while there is no pipeline."""
