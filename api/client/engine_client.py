"""The front end's side of the engine: starts the process, hands it requests, spreads its outputs over them."""

import asyncio
import itertools
import os
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Generic, TypeVar

import msgspec

from api.client.open_requests import Load, OpenRequests, RequestStream
from api.client.request_metrics import RequestMetrics
from api.engine.options import EngineOptions
from api.errors import EngineError
from api.messages.engine import (
    AbortRequest,
    AddRequest,
    Counts,
    EngineMetrics,
    EngineState,
    FinishReason,
    FromEngine,
    GetCounts,
    GetMetrics,
    GetPipelineReport,
    Outputs,
    PipelineReport,
    RequestOutput,
    error_of,
    failed_output,
    failed_state,
    loading_state,
    not_ready,
    takes_requests,
)
from api.messages.framing import Framing
from api.scheduler.sequence import check_request

PROBE_TIMEOUT_S = 2.0

"""How long the engine has to answer while its state says that it is ready."""

leave_group = os.setpgrp

"""For subprocess's `preexec_fn`: the child becomes a process group of its own (uvloop has no other way to say so).

It does not become a session: Linux shares the cores out among sessions first (sched(7), autogroups), and on a busy core
one that has slept may then wait for seconds although it could run, as a front end did that was in another session than
its stages.
"""

Answer = TypeVar("Answer")


class Questions(Generic[Answer]):
    """Those of one kind: the engine answers them in the order of asking."""

    def __init__(self) -> None:
        self._open: deque[asyncio.Future[Answer]] = deque()

    def ask(self) -> "asyncio.Future[Answer]":
        """The answer to come. Who does not want it any more cancels it."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._open.append(answer)
        return answer

    def answer(self, answer: Answer) -> None:
        """The oldest question is answered."""
        oldest = self._open.popleft()
        if not oldest.done():
            oldest.set_result(answer)

    def fail(self, error: EngineError) -> None:
        """No answer will come."""
        for question in self._open:
            if not question.done():
                question.set_exception(error)
        self._open.clear()


EXIT_MARGIN_S = 5.0

"""What the engine gets beyond its stages' deadline before it is killed, and its connection after its own end."""

ANSWER_TIMEOUT_S = 5.0

"""The engine answers at once, or within the second that it gives its stages; only its own start takes longer."""


class EngineClient:
    """One engine process and the requests in it. Belongs to the event loop that started it.

    `requests` measures every request from here on.
    """

    def __init__(self, options: EngineOptions, on_state: Callable[[EngineState], None] | None = None) -> None:
        """Not started yet: see `start`, or `launch`. Raises OptionError when the scheduler's options do not fit."""
        self._options = options
        self._cache = options.scheduler.cache
        self.requests = RequestMetrics(self._cache.max_model_len)
        self._on_state = on_state
        self._state = loading_state("The engine process was not started yet.")
        self._state_changed = asyncio.Event()
        self._request_ids = itertools.count()
        self._open = OpenRequests()
        self._counts: Questions[Counts] = Questions()
        self._metrics: Questions[EngineMetrics] = Questions()
        self._reports: Questions[PipelineReport] = Questions()
        self._messages: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._framing = Framing(self._take)
        self._process: Process | None = None
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    @asynccontextmanager
    async def start(
        cls, options: EngineOptions, on_state: Callable[[EngineState], None] | None = None
    ) -> AsyncIterator["EngineClient"]:
        """`async with EngineClient.start(options) as engine`: runs the process, and ends it afterwards.

        Does not wait for the pipeline: see `wait_ready`. `on_state` is called on the loop with every new state.
        """
        engine = cls(options, on_state)
        try:
            await engine.launch()
            yield engine
        finally:
            await engine.close()

    @property
    def state(self) -> EngineState:
        """Where the engine stands now; "failed" once its process is gone."""
        return self._state

    @property
    def pid(self) -> int:
        """The engine's process id. Raises EngineError before it was started."""
        if self._process is None:
            raise EngineError.for_clients("The engine process was not started.")
        return self._process.pid

    @property
    def load(self) -> Load:
        """What the engine has to do, as far as its requests say."""
        return self._open.load

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns when the pipeline is ready.

        Raises the error that it failed with (a class of api.errors' tables, so that `exit_code` holds), or EngineError
        after `timeout_s` seconds, with what was being done.
        """
        try:
            await asyncio.wait_for(self._left_loading(), timeout_s)
        except asyncio.TimeoutError:
            raise EngineError(
                f"The engine was not ready within {timeout_s:g} s. Last it said: {self._state.sentence}"
            ) from None
        if self._state.phase == "failed":
            raise error_of(self._state)

    async def wait_failed(self) -> None:
        """Waits for the engine to fail for good, then raises its error as `wait_ready` does."""
        while self._state.phase != "failed":
            await self._state_changed.wait()
        raise error_of(self._state)

    def next_request_id(self) -> int:
        """An id for the next AddRequest."""
        return next(self._request_ids)

    def generate(self, request: AddRequest) -> RequestStream:
        """Hands the request to the engine at once.

        Raises RequestError if it can never fit the cache, NotReadyError while the engine is not ready, and ValueError
        for an id that is in use.
        """
        check_request(request, self._cache)
        if not takes_requests(self._state):
            raise not_ready(self._state)
        stream = RequestStream(request, self._abort)
        self._open.add(stream)
        self.requests.began(request)
        self._framing.send(request)
        return stream

    def unanswered(self) -> list[RequestStream]:
        """Requests that could go to another engine: of their answers nothing has come."""
        return self._open.unanswered()

    def move(self, stream: RequestStream, other: "EngineClient") -> None:
        """Gives one of the unanswered requests to another engine, which is ready; this one has failed."""
        request = stream.request
        self._open.remove(request.request_id)
        stream.move(other._abort)
        other._open.add(stream)
        other.requests.adopt(request.request_id, self.requests.release(request.request_id))
        other._framing.send(request)

    async def counts(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Counts:
        """The engine's books. Raises EngineError if the engine is gone or does not answer in `timeout_s` seconds."""
        return await self._answer(self._counts, GetCounts(), timeout_s)

    async def metrics(self, timeout_s: float = ANSWER_TIMEOUT_S) -> EngineMetrics:
        """What the engine has measured. Raises EngineError as `counts` does."""
        return await self._answer(self._metrics, GetMetrics(), timeout_s)

    async def report(self, timeout_s: float = ANSWER_TIMEOUT_S) -> PipelineReport:
        """What the engine and its stages do now. Raises EngineError as `counts` does."""
        return await self._answer(self._reports, GetPipelineReport(), timeout_s)

    async def close(self) -> None:
        """Ends the engine and its pipeline; kills it when it is not gone `close_timeout_s` later. May be repeated."""
        self._end(EngineError.for_clients("The engine was closed."))
        self._framing.close()
        if self._process is None or self._watching is None:
            return
        _, running = await asyncio.wait([self._watching], timeout=self._options.close_timeout_s + EXIT_MARGIN_S)
        if running:
            self._process.kill()
        await self._watching

    async def _answer(
        self, questions: Questions[Answer], question: GetCounts | GetMetrics | GetPipelineReport, timeout_s: float
    ) -> Answer:
        if self._process is None:
            raise EngineError.for_clients("The engine process was not started.")
        if self._framing.lost.is_set():
            raise EngineError.for_clients("The engine is gone.")
        answer = questions.ask()
        self._framing.send(question)
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except asyncio.TimeoutError:
            raise EngineError.for_clients(f"The engine did not answer within {timeout_s:g} s.") from None

    async def launch(self) -> None:
        """Runs the process; to be called once, and `close` is to follow in any case."""
        self._set_state(loading_state("The engine process starts."))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            await asyncio.get_running_loop().create_unix_connection(lambda: self._framing, sock=ours)
            # The first of all frames: nobody asks anything before there is a process.
            self._framing.send(self._options)
            try:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-m", "api.engine", str(theirs.fileno())),
                    pass_fds=[theirs.fileno()],
                    stdin=DEVNULL,
                    # The standard output is the command's own; the engine and what it starts only log.
                    stdout=sys.__stderr__,
                    # The working directory's modules are not ours (Python 3.11 and later).
                    env={**os.environ, "PYTHONSAFEPATH": "1"},
                    # Ctrl-C is for the front end, which lets the open requests end before it ends the engine.
                    preexec_fn=leave_group,
                )
            except BaseException:
                self._framing.close()
                raise
        self._watching = asyncio.create_task(self._watch(self._process))

    async def _watch(self, process: Process) -> None:
        """Waits for the engine's end, and for its last words."""
        code = await process.wait()
        # A process that the engine left behind might hold the connection open.
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._framing.lost.wait(), EXIT_MARGIN_S)
        self._framing.close()
        self._end(EngineError.for_clients(f"The engine process ended with exit code {code}; its log says why."))

    async def _left_loading(self) -> None:
        while self._state.phase == "loading":
            await self._state_changed.wait()

    def _take(self, frame: memoryview) -> None:
        message = self._messages.decode(frame)
        if isinstance(message, Outputs):
            self._hand_on(message.outputs)
        elif isinstance(message, EngineState):
            self._set_state(message)
        elif isinstance(message, Counts):
            self._counts.answer(message)
        elif isinstance(message, EngineMetrics):
            self._metrics.answer(message)
        elif isinstance(message, PipelineReport):
            self._reports.answer(message)

    def _hand_on(self, outputs: list[RequestOutput]) -> None:
        self.requests.received(outputs)
        streams = self._open.streams
        for output in outputs:
            # What was on its way when a request was aborted has no stream any more.
            stream = streams.get(output.request_id)
            if stream is not None:
                stream.push(output)
                if output.finish_reason is not None:
                    self._open.remove(output.request_id)

    def _abort(self, request_id: int, reason: FinishReason) -> None:
        self._open.remove(request_id)
        self.requests.ended_here(request_id, reason)
        self._framing.send(AbortRequest(request_id=request_id))

    def _set_state(self, state: EngineState) -> None:
        self._state = state
        self._state_changed.set()
        self._state_changed = asyncio.Event()
        if self._on_state is not None:
            self._on_state(state)

    def _end(self, error: EngineError) -> None:
        """Nothing comes from the engine any more. The reason that it gave itself, if it failed, stays."""
        if self._state.phase != "failed":
            self._set_state(failed_state(error))
        self._hand_on([failed_output(request_id, error_of(self._state)) for request_id in self._open.streams])
        for questions in (self._counts, self._metrics, self._reports):
            questions.fail(EngineError(self._state.sentence, public=self._state.public_sentence))
