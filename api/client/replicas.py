"""The replicas behind one front end: engines that do the same work, each with a pipeline of its own."""

import asyncio
import functools
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import structlog

from actors.cluster.environment import cluster_address
from api.client.engine_client import EngineClient
from api.client.open_requests import Load, RequestStream, least_loaded
from api.client.prefix_routes import PrefixRoutes
from api.engine.options import EngineOptions
from api.messages.engine import (
    AddRequest,
    EngineState,
    common_state,
    error_of,
    failed_state,
    named_state,
    not_ready,
    takes_requests,
)
from api.scheduler.sequence import check_request
from api.scheduler.slots import MUCH_FULLER
from weights.errors import GalaxylineError

log = structlog.get_logger()


class Replicas:
    """A `TokenSource` of one or more engines; each request goes to the one with the least to do.

    A request whose beginning went to a replica before goes there again, for what that has in its cache, unless it has
    much more to do than another.

    When an engine fails, its requests that have no output yet move to another one, each of them at most once, as the
    request itself may be what ends engines. The others end with an error. Failed engines are not replaced.
    """

    def __init__(self, options: Sequence[EngineOptions], on_state: Callable[[EngineState, int], None]) -> None:
        """Makes replicas that are not started: see `open`. Raises OptionError when the options do not fit."""
        self.engines = [
            EngineClient(each, functools.partial(self._on_engine_state, replica))
            for replica, each in enumerate(options)
        ]
        self._on_state = on_state
        self._cache = options[0].scheduler.cache
        # Ray's own start has a deadline of 30 s, which several at once miss on a busy host. In a cluster that is there
        # nothing of the kind is started, and weights load on all hosts at once.
        self._routes = PrefixRoutes() if len(options) > 1 and options[0].schedule.enable_prefix_caching else None
        self._excess = max(self._cache.slots // MUCH_FULLER, 1)
        self._is_in_turn = cluster_address(options[0].pipeline.cluster.ray_address) is None
        self._last = len(self.engines) - 1
        self._request_ids = itertools.count()
        self._is_closing = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls, options: Sequence[EngineOptions], on_state: Callable[[EngineState, int], None]
    ) -> AsyncIterator["Replicas"]:
        """Makes replicas, and ends them afterwards.

        Use it as `async with Replicas.open(options, on_state) as replicas: await replicas.start(timeout_s)`. `on_state`
        is called on the loop with every new state and the number of its replica.
        """
        replicas = cls(options, on_state)
        try:
            yield replicas
        finally:
            await replicas.close()

    @property
    def state(self) -> EngineState:
        """The state of all engines together: see `common_state`."""
        return common_state([engine.state for engine in self.engines])

    async def start(self, timeout_s: float) -> None:
        """Starts all engines and returns when every pipeline is ready; each has `timeout_s` seconds.

        Raises the error of the first that fails, with the number of its replica: see `EngineClient.wait_ready`.
        """
        if self._is_in_turn:
            for replica in range(len(self.engines)):
                await self._start(replica, timeout_s)
            return
        starting = [asyncio.create_task(self._start(replica, timeout_s)) for replica in range(len(self.engines))]
        try:
            await asyncio.gather(*starting)
        finally:
            for start in starting:
                start.cancel()

    async def wait_failed(self) -> None:
        """Waits for all engines to fail for good, then raises the error of one, like `start`."""
        await asyncio.gather(*(engine.wait_failed() for engine in self.engines), return_exceptions=True)
        raise error_of(self.state)

    async def probe(self) -> None:
        """Returns when one of the ready engines answers, with all its stages. Raises EngineError where none does."""
        asked = [engine.probe() for engine in self.engines if engine.state.phase == "ready"]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if failures and len(failures) == len(answers):
            raise failures[0]

    def next_request_id(self) -> int:
        """Returns the id for the next AddRequest, whichever engine it goes to."""
        return next(self._request_ids)

    def generate(self, request: AddRequest) -> RequestStream:
        """Sends the request to an engine. Raises like `EngineClient.generate`."""
        chosen = self._choose(request)
        if chosen is None:
            check_request(request, self._cache)
            raise not_ready(self.state)
        stream = self.engines[chosen].generate(request)
        self._last = chosen
        if self._routes is not None:
            self._routes.note(request, chosen)
        return stream

    async def close(self) -> None:
        """Ends all engines and their pipelines; requests that are open end with an error. May be repeated."""
        self._is_closing = True
        await asyncio.gather(*(engine.close() for engine in self.engines))

    def kill(self) -> None:
        """Ends all engines' processes at once, for `close`, which waits for them."""
        for engine in self.engines:
            engine.kill()

    async def _start(self, replica: int, timeout_s: float) -> None:
        engine = self.engines[replica]
        await engine.launch()
        try:
            await engine.wait_ready(timeout_s)
        except GalaxylineError as error:
            if len(self.engines) == 1:
                raise
            raise error_of(named_state(failed_state(error), replica)) from error

    def _choose(self, request: AddRequest) -> int | None:
        """The engine that a request goes to; None where no engine takes requests."""
        loads = self._loads()
        least = least_loaded(loads, self._last)
        known = None if self._routes is None else self._routes.find(request)
        if known is None or least is None:
            return least
        load, lowest = loads[known], loads[least]
        if load is None or lowest is None or load.requests - lowest.requests > self._excess:
            return least
        return known

    def _loads(self) -> list[Load | None]:
        """The loads of the engines that are ready or, where none is, of those that will be once a stage is replaced."""
        states = [engine.state for engine in self.engines]
        is_any_ready = any(state.phase == "ready" for state in states)
        return [
            engine.load if state.phase == "ready" or (not is_any_ready and takes_requests(state)) else None
            for engine, state in zip(self.engines, states, strict=True)
        ]

    def _on_engine_state(self, replica: int, state: EngineState) -> None:
        self._on_state(state, replica)
        if state.phase == "failed" and not self._is_closing:
            moved = self._move_requests(self.engines[replica])
            log.warning("an engine failed", replica=replica, error=state.sentence, moved_requests=moved)

    def _move_requests(self, failed: EngineClient) -> int:
        """Moves the unanswered requests to other engines, and returns how many it moved."""
        moved = 0
        for stream in failed.unanswered():
            chosen = least_loaded(self._loads(), self._last)
            if chosen is None:
                break
            if not stream.was_moved:
                failed.move(stream, self.engines[chosen])
                self._last = chosen
                moved += 1
        return moved
