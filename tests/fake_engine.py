"""An engine without a model: it completes requests with tokens that the test chose."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from api.errors import EngineError
from api.messages import AddRequest, EngineState, FinishReason, RequestOutput
from api.token_source import TokenStream

Script = Callable[[AddRequest], Sequence[int]]


class FakeStream:
    """One request: its script's tokens, one per output, until `max_tokens` or one of its stop tokens."""

    def __init__(self, request: AddRequest, tokens: Sequence[int], fail_after: int | None) -> None:
        self.request = request
        self.outputs: asyncio.Queue[RequestOutput | EngineError] = asyncio.Queue()
        self.ended = False
        self.aborted = asyncio.Event()
        self._fail_after = fail_after
        self._given = 0
        for count, token in enumerate(tokens[: request.max_tokens], start=1):
            if token in request.stop_token_ids:
                self._put([token], finish="stop")
                return
            self._put([token], finish="length" if count == request.max_tokens else None)

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.ended or self.aborted.is_set():
            raise StopAsyncIteration
        if self._given == self._fail_after:
            self.ended = True
            raise EngineError("Stage 1 on 127.0.0.1 died at step 7: /srv/models/x.safetensors has no model.norm.weight")
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

    def fail(self) -> None:
        """Ends the request with an error, after what it has been given."""
        self.outputs.put_nowait(EngineError("The engine was closed."))

    def _put(self, tokens: list[int], finish: FinishReason | None) -> None:
        self.outputs.put_nowait(
            RequestOutput(request_id=self.request.request_id, tokens=tokens, finish_reason=finish, error=None)
        )


class FakeEngine:
    """Answers each request from `script`; a script shorter than its `max_tokens` leaves the request waiting."""

    def __init__(self, script: Script, fail_after: int | None = None) -> None:
        self.state = EngineState(phase="ready", detail="")
        self.streams: list[FakeStream] = []
        self.refusal: Exception | None = None
        self.script = script
        self._fail_after = fail_after
        self._request_id = 0

    def next_request_id(self) -> int:
        self._request_id += 1
        return self._request_id

    def generate(self, request: AddRequest) -> TokenStream:
        if self.refusal is not None:
            raise self.refusal
        stream = FakeStream(request, self.script(request), self._fail_after)
        self.streams.append(stream)
        return stream
