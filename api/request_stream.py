"""The outputs of one request, as its consumer sees them."""

import asyncio
from collections.abc import AsyncIterator, Callable

from api.errors import EngineError
from api.messages import FinishReason, RequestOutput


class RequestStream(AsyncIterator[RequestOutput]):
    """The outputs of one request, in order, up to and with the one that has a `finish_reason`.

    Never yields an "error" output: raises EngineError with its sentence instead, as when the engine dies. Closing it,
    or cancelling the task that waits on it, before the last output aborts the request: use `contextlib.aclosing`.
    """

    def __init__(self, request_id: int, abort: Callable[[int, FinishReason], None]) -> None:
        """`abort` is called once at most, with why, and never after the last output was pushed."""
        self._request_id = request_id
        self._abort = abort
        self._outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._is_complete = False
        self._is_over = False

    def push(self, output: RequestOutput) -> None:
        """Hands on the next output."""
        self._is_complete = output.finish_reason is not None
        self._outputs.put_nowait(output)

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
            raise EngineError(output.error or "The engine gave no reason.")
        return output

    async def aclose(self, reason: FinishReason = "abort") -> None:
        """Aborts the request unless it has ended: "stop" where its text is complete. May be repeated."""
        self._is_over = True
        if not self._is_complete:
            self._is_complete = True
            self._abort(self._request_id, reason)
