"""The front end's side of the engine: starts the process, hands it requests, spreads its outputs over them."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from api.engine_options import EngineOptions
from api.messages import AddRequest, Counts, EngineState, RequestOutput


class RequestStream(AsyncIterator[RequestOutput]):
    """The outputs of one request, in order, up to and with the one that has a `finish_reason`.

    Never yields an "error" output: raises EngineError with its sentence instead, as when the engine dies. Closing it,
    or cancelling the task that waits on it, before the last output aborts the request: use `contextlib.aclosing`.
    """

    async def __anext__(self) -> RequestOutput:
        raise NotImplementedError

    async def aclose(self) -> None:
        """Aborts the request unless it has ended. May be repeated."""
        raise NotImplementedError


class EngineClient:
    """One engine process and the requests in it. Belongs to the event loop that started it."""

    @classmethod
    @asynccontextmanager
    async def start(
        cls, options: EngineOptions, on_state: Callable[[EngineState], None] | None = None
    ) -> AsyncIterator["EngineClient"]:
        """`async with EngineClient.start(options) as engine`: runs the process, and ends it afterwards.

        Does not wait for the pipeline: see `wait_ready`. `on_state` is called on the loop with every new state.
        """
        yield cls()

    @property
    def state(self) -> EngineState:
        """Where the engine stands now; "failed" once its process is gone."""
        raise NotImplementedError

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns when the pipeline is ready.

        Raises the error that it failed with (a class of api.errors' tables, so that `exit_code` holds), or EngineError
        after `timeout_s` seconds, with what was being done.
        """
        raise NotImplementedError

    def next_request_id(self) -> int:
        """An id for the next AddRequest."""
        raise NotImplementedError

    def generate(self, request: AddRequest) -> RequestStream:
        """Hands the request to the engine at once.

        Raises RequestError if it can never fit the cache, NotReadyError while the engine is not ready.
        """
        raise NotImplementedError

    async def counts(self, timeout_s: float = 5.0) -> Counts:
        """The engine's books. Raises EngineError if the engine is gone or does not answer in `timeout_s` seconds."""
        raise NotImplementedError

    async def close(self) -> None:
        """Ends the engine and its pipeline; kills it when it is not gone `close_timeout_s` later. May be repeated."""
        raise NotImplementedError
