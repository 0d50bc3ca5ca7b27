"""The front end's side of one engine: it starts the process, sends it requests and gives each its outputs."""

import asyncio
import itertools
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Generic, TypeVar

import msgspec

from actors.release import child_environment
from actors.run_directory import RunDirectory, remove_abandoned
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
    PrefixCacheReset,
    RequestOutput,
    ResetPrefixCache,
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
"""How long the engine has to answer a health check while its state is "ready"."""

ANSWER_TIMEOUT_S = 5.0
"""How long the engine has to answer a query: it does so at once, or within the second that it gives its stages."""

EXIT_MARGIN_S = 5.0
"""How long after its stages' deadline the engine is killed, and how long after its end its connection may stay open."""

UNREADY_CLOSE_S = 0.7
"""How long an engine that is still starting has to end: it holds nothing that would be lost."""

NOT_WRITTEN = "What is in --kv-dir may be found again after the next start: the server's log has the cause."
"""What clients may see of a reset that the disk did not take."""

leave_group = os.setpgrp
"""For subprocess's `preexec_fn`: makes the child a process group of its own (uvloop has no other way).

It does not make it a session: Linux shares the cores out among sessions first (sched(7), autogroups). On a busy core a
process that has slept may then wait for seconds, as a front end did whose stages were in another session.
"""

Reply = TypeVar("Reply")

Query = GetCounts | GetMetrics | GetPipelineReport | ResetPrefixCache


class PendingReplies(Generic[Reply]):
    """The replies of one kind that are still to come: the engine sends them in the order of the queries."""

    def __init__(self) -> None:
        self._pending: deque[asyncio.Future[Reply]] = deque()

    def expect(self) -> "asyncio.Future[Reply]":
        """Returns the reply to the query that is sent next. Cancel it when it is no longer wanted."""
        reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._pending.append(reply)
        return reply

    def resolve(self, reply: Reply) -> None:
        """Gives the oldest query its reply."""
        oldest = self._pending.popleft()
        if not oldest.done():
            oldest.set_result(reply)

    def fail(self, error: EngineError) -> None:
        """Ends all queries with an error, as no reply will come."""
        for reply in self._pending:
            if not reply.done():
                reply.set_exception(error)
        self._pending.clear()


class EngineClient:
    """One engine process and the requests in it. Belongs to the event loop that started it.

    `requests` has the metrics of all its requests.
    """

    def __init__(self, options: EngineOptions, on_state: Callable[[EngineState], None] | None = None) -> None:
        """Makes a client whose process is not started: see `start` and `launch`.

        Raises OptionError when the scheduler's options do not fit together.
        """
        self._options = options
        self._cache = options.scheduler.cache
        self.requests = RequestMetrics(self._cache.max_model_len)
        self._on_state = on_state
        self._state = loading_state("The engine process was not started yet.")
        self._state_changed = asyncio.Event()
        self._was_ready = False
        self._request_ids = itertools.count()
        self._open = OpenRequests()
        self._counts: PendingReplies[Counts] = PendingReplies()
        self._metrics: PendingReplies[EngineMetrics] = PendingReplies()
        self._reports: PendingReplies[PipelineReport] = PendingReplies()
        self._resets: PendingReplies[PrefixCacheReset] = PendingReplies()
        self._messages: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._framing = Framing(self._handle_frame)
        self._directory: RunDirectory | None = None
        self._process: Process | None = None
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    @asynccontextmanager
    async def start(
        cls, options: EngineOptions, on_state: Callable[[EngineState], None] | None = None
    ) -> AsyncIterator["EngineClient"]:
        """Runs the process, and ends it afterwards: `async with EngineClient.start(options) as engine`.

        It does not wait for the pipeline: see `wait_ready`. `on_state` is called on the loop with every new state.
        """
        engine = cls(options, on_state)
        try:
            await engine.launch()
            yield engine
        finally:
            await engine.close()

    @property
    def state(self) -> EngineState:
        """The engine's state now; "failed" once its process is gone."""
        return self._state

    @property
    def pid(self) -> int:
        """The engine's process id. Raises EngineError before it was started."""
        if self._process is None:
            raise EngineError.for_clients("The engine process was not started.")
        return self._process.pid

    @property
    def load(self) -> Load:
        """How much work the engine's open requests are."""
        return self._open.load

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns when the pipeline is ready.

        Raises the error that it failed with (a class of api.errors' tables, so that `exit_code` holds), or EngineError
        after `timeout_s` seconds, with the engine's last state.
        """
        try:
            await asyncio.wait_for(self._left_loading(), timeout_s)
        except asyncio.TimeoutError:
            raise EngineError(
                f"The engine was not ready within {timeout_s:g} s. Its last state was: {self._state.sentence}"
            ) from None
        if self._state.phase == "failed":
            raise error_of(self._state)

    async def wait_failed(self) -> None:
        """Waits for the engine to fail for good, then raises its error as `wait_ready` does."""
        while self._state.phase != "failed":
            await self._state_changed.wait()
        raise error_of(self._state)

    def next_request_id(self) -> int:
        """Returns the id for the next AddRequest."""
        return next(self._request_ids)

    def generate(self, request: AddRequest) -> RequestStream:
        """Sends the request to the engine at once, and returns its outputs to come.

        Raises RequestError if it can never fit the cache, NotReadyError while the engine is not ready, and ValueError
        for an id that is in use.
        """
        check_request(request, self._cache)
        if not takes_requests(self._state):
            raise not_ready(self._state)
        stream = RequestStream(request, self._abort)
        self._open.add_stream(stream)
        self.requests.began(request)
        self._framing.send(request)
        return stream

    def unanswered(self) -> list[RequestStream]:
        """The requests that could move to another engine, as none of their outputs has come."""
        return self._open.unanswered()

    def move(self, stream: RequestStream, other: "EngineClient") -> None:
        """Moves one of the unanswered requests of this engine, which has failed, to another one that is ready."""
        request = stream.request
        self._open.remove_request(request.request_id)
        stream.move(other._abort)
        other._open.add_stream(stream)
        other.requests.adopt(request.request_id, self.requests.release(request.request_id))
        other._framing.send(request)

    async def counts(self, timeout_s: float = ANSWER_TIMEOUT_S) -> Counts:
        """Queries the engine's counts. Raises EngineError if it is gone or does not answer in `timeout_s` seconds."""
        return await self._query(self._counts, GetCounts(), timeout_s)

    async def metrics(self, timeout_s: float = ANSWER_TIMEOUT_S) -> EngineMetrics:
        """Queries the engine's measurements. Raises EngineError like `counts`."""
        return await self._query(self._metrics, GetMetrics(), timeout_s)

    async def report(self, timeout_s: float = ANSWER_TIMEOUT_S) -> PipelineReport:
        """Queries the state of the engine and its stages. Raises EngineError like `counts`."""
        return await self._query(self._reports, GetPipelineReport(), timeout_s)

    async def reset_prefix_cache(self, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Lets no later request begin with what is cached now.

        Raises EngineError like `counts`, and where a directory may bring it back at the next start.
        """
        reset = await self._query(self._resets, ResetPrefixCache(), timeout_s)
        if reset.problem:
            raise EngineError(reset.problem, public=NOT_WRITTEN)

    async def probe(self) -> None:
        """Returns when the engine and all its stages answer. Raises EngineError, which names who does not.

        A stage has a second twice, as it may be busy. It takes no longer than PROBE_TIMEOUT_S each time.
        """
        silent = await self._silent_stages()
        if silent and (silent := silent & await self._silent_stages()):
            raise EngineError.for_clients(f"Stage {min(silent)} does not answer.")

    async def _silent_stages(self) -> set[int]:
        report = await self.report(PROBE_TIMEOUT_S)
        return {stage.stage for stage in report.stages if stage.state == "silent"}

    async def close(self) -> None:
        """Ends the engine and its pipeline. May be repeated.

        It is killed when it takes longer than `close_timeout_s`, or than UNREADY_CLOSE_S where it has never been ready,
        and when the task that awaits this is cancelled. Nothing of it is left then.
        """
        self._end(EngineError.for_clients("The engine was closed."))
        self._framing.close()
        if self._watching is None:
            return
        timeout_s = self._options.close_timeout_s + EXIT_MARGIN_S if self._was_ready else UNREADY_CLOSE_S
        try:
            await asyncio.wait([self._watching], timeout=timeout_s)
        finally:
            self.kill()
            await asyncio.shield(self._watching)

    def kill(self) -> None:
        """Ends the engine's process at once, if it still runs, for `close` to end what it leaves."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def _query(self, pending: PendingReplies[Reply], query: Query, timeout_s: float) -> Reply:
        if self._process is None:
            raise EngineError.for_clients("The engine process was not started.")
        if self._framing.lost.is_set():
            raise EngineError.for_clients("The engine is gone.")
        reply = pending.expect()
        self._framing.send(query)
        try:
            return await asyncio.wait_for(reply, timeout_s)
        except asyncio.TimeoutError:
            raise EngineError.for_clients(f"The engine did not answer within {timeout_s:g} s.") from None

    async def launch(self) -> None:
        """Runs the process. Call it once, and `close` in any case afterwards."""
        self._set_state(loading_state("The engine process starts."))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            await asyncio.get_running_loop().create_unix_connection(lambda: self._framing, sock=ours)
            try:
                await asyncio.to_thread(remove_abandoned)
                self._directory = directory = RunDirectory.create()
                pipeline = msgspec.structs.replace(self._options.pipeline, directory=str(directory.path))
                # This is the first frame, as no query is sent before there is a process.
                self._framing.send(msgspec.structs.replace(self._options, pipeline=pipeline))
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-m", "api.engine", str(theirs.fileno())),
                    pass_fds=[theirs.fileno()],
                    stdin=DEVNULL,
                    # The standard output is the command's own; the engine and what it starts only log.
                    stdout=sys.__stderr__,
                    # The modules of the user's working directory are not ours, for the engine as for the workers of
                    # Ray, which put the directory of the process that started them in front of their path.
                    cwd=directory.path,
                    env=child_environment(os.environ),
                    # Ctrl-C is for the front end, which lets the open requests end before it ends the engine.
                    preexec_fn=leave_group,
                )
            except BaseException:
                self._framing.close()
                await self._remove_directory()
                raise
        self._watching = asyncio.create_task(self._watch(self._process))

    async def _watch(self, process: Process) -> None:
        """Waits for the engine's end and its last frames."""
        code = await process.wait()
        # The wait is bounded, as a process that the engine left behind might hold the connection open.
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._framing.lost.wait(), EXIT_MARGIN_S)
        self._framing.close()
        self._end(EngineError.for_clients(_end_sentence(code)))
        await self._remove_directory()

    async def _remove_directory(self) -> None:
        """Removes what the engine has left, which is nothing unless it was killed."""
        if self._directory is not None:
            await asyncio.to_thread(self._directory.remove)

    async def _left_loading(self) -> None:
        while self._state.phase == "loading":
            await self._state_changed.wait()

    def _handle_frame(self, frame: memoryview) -> None:
        message = self._messages.decode(frame)
        if isinstance(message, Outputs):
            self._push_outputs(message.outputs)
        elif isinstance(message, EngineState):
            self._set_state(message)
        elif isinstance(message, Counts):
            self._counts.resolve(message)
        elif isinstance(message, EngineMetrics):
            self._metrics.resolve(message)
        elif isinstance(message, PipelineReport):
            self._reports.resolve(message)
        elif isinstance(message, PrefixCacheReset):
            self._resets.resolve(message)

    def _push_outputs(self, outputs: list[RequestOutput]) -> None:
        self.requests.received(outputs)
        streams = self._open.streams
        for output in outputs:
            # Outputs that were on their way when their request was aborted have no stream.
            stream = streams.get(output.request_id)
            if stream is not None:
                stream.push(output)
                if output.finish_reason is not None:
                    self._open.remove_request(output.request_id)

    def _abort(self, request_id: int, reason: FinishReason) -> None:
        self._open.remove_request(request_id)
        self.requests.ended_here(request_id, reason)
        self._framing.send(AbortRequest(request_id=request_id))

    def _set_state(self, state: EngineState) -> None:
        self._state = state
        self._was_ready = self._was_ready or state.phase == "ready"
        self._state_changed.set()
        self._state_changed = asyncio.Event()
        if self._on_state is not None:
            self._on_state(state)

    def _end(self, error: EngineError) -> None:
        """Ends all requests and queries, as the engine sends nothing any more. If it had failed, that error stays."""
        if self._state.phase != "failed":
            self._set_state(failed_state(error))
        self._push_outputs([failed_output(request_id, error_of(self._state)) for request_id in self._open.streams])
        for pending in (self._counts, self._metrics, self._reports, self._resets):
            pending.fail(EngineError(self._state.sentence, public=self._state.public_sentence))


def _end_sentence(code: int) -> str:
    """Says how the engine's process ended, by its return code: negative where a signal has killed it."""
    if code >= 0:
        return f"The engine process ended with exit code {code}; its log says why."
    if -code == signal.SIGKILL:
        return f"The engine process was killed by signal {-code}, perhaps for want of memory."
    return f"The engine process was killed by signal {-code} ({signal.strsignal(-code)})."
