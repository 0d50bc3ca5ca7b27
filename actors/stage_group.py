"""The actors of one pipeline: made, asked and ended together. The module imports Ray; see `cluster`."""

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar, cast

import ray
import structlog
from ray import ObjectRef
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster import Cluster
from actors.errors import LinkError, PipelineError, ProtocolError, StartError
from actors.health import Phase, StageHealth, StageProgress, State
from actors.placement import ROWS
from actors.placement_group import Placement
from actors.sockets.address import Address
from actors.stage_actor import StageActor, StageSetup
from weights.errors import GalaxylineError

Result = TypeVar("Result")
OnStageProgress = Callable[[StageProgress], None]

HEALTH_SECONDS = 1.0
PROGRESS_SECONDS = 0.2
CLOSE_SECONDS = 5.0
"""A little more than a stage server allows itself for its own close."""
GONE_SECONDS = 5.0
GONE_POLL_SECONDS = 0.02

_log = structlog.get_logger()


class StageGroup:
    """Handles of all stages, in order. Every call has a deadline, and a stage that misses it is named."""

    def __init__(self, cluster: Cluster, placement: Placement, setups: Sequence[StageSetup], here: str) -> None:
        """`here` is the node of this process."""
        self._cluster = cluster
        self._placement = placement
        self._setups = setups
        self._here = here
        self._pids: dict[int, int] = {}
        self._actors = [self._make(setup, seat.bundle) for setup, seat in zip(setups, placement.seats, strict=True)]

    def _make(self, setup: StageSetup, bundle: int) -> "ActorHandle[StageActor]":
        remote: ActorClass[StageActor] = ray.remote(StageActor)
        handle = remote.options(
            num_cpus=0,
            resources={ROWS: len(setup.rows)},
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement.group, bundle),
        ).remote(setup)
        return cast("ActorHandle[StageActor]", handle)

    async def load(self, deadline: float, on_progress: OnStageProgress) -> None:
        """Loads all stages side by side until the loop's clock shows `deadline`.

        Raises StartError naming stage and host, or what the weights, the plan or the device had to object.
        """
        for index in range(len(self._actors)):
            on_progress(self._progress(index, "starting", 0, len(self._setups[index].spec.layers)))
        watching = asyncio.create_task(self._watch(on_progress))
        try:
            await self._all("load its weights", [actor.load.remote() for actor in self._actors], deadline)
        finally:
            watching.cancel()
        for index in range(len(self._actors)):
            layers = len(self._setups[index].spec.layers)
            on_progress(self._progress(index, "connecting", layers, layers))
        for health in await self.health():
            self._note_pid(health)

    async def listen(self, addresses: Sequence[Address], deadline: float) -> list[Address]:
        """Opens one address a stage; returns those they were bound to. Raises StartError."""
        refs = [actor.listen.remote(address) for actor, address in zip(self._actors, addresses, strict=True)]
        return await self._all("open its socket", refs, deadline)

    async def connect(self, addresses: Sequence[Address], deadline: float) -> None:
        """Joins every stage to the address beside it. Raises StartError."""
        refs = [actor.connect.remote(address) for actor, address in zip(self._actors, addresses, strict=True)]
        await self._all("join the next stage", refs, deadline)

    async def health(self) -> list[StageHealth]:
        """What every stage says of itself within a second."""
        return list(await asyncio.gather(*(self._health(index) for index in range(len(self._actors)))))

    async def close(self) -> None:
        """Ends the actors and gives back their rows; waits until the processes on this host are gone.

        Raises PipelineError if they do not go.
        """
        closing = [asyncio.ensure_future(_settled(_answer(actor.close.remote()))) for actor in self._actors]
        await asyncio.wait(closing, timeout=CLOSE_SECONDS)
        for actor in self._actors:
            await self._cluster.call(_kill, actor)
        await self._placement.remove()
        deadline = asyncio.get_running_loop().time() + GONE_SECONDS
        while left := [pid for pid in self._pids.values() if _exists(pid)]:
            if asyncio.get_running_loop().time() > deadline:
                raise PipelineError(f"The stage processes {left} on {socket.gethostname()} did not end when killed.")
            await asyncio.sleep(GONE_POLL_SECONDS)

    async def _health(self, index: int) -> StageHealth:
        try:
            health: StageHealth = await asyncio.wait_for(_answer(self._actors[index].health.remote()), HEALTH_SECONDS)
        except asyncio.TimeoutError:
            return self._absent(index, "silent", f"no answer within {HEALTH_SECONDS:g} s")
        except RayActorError as error:
            return self._absent(index, "dead", _death(error))
        return health

    def _absent(self, index: int, state: State, detail: str) -> StageHealth:
        return StageHealth(
            stage=index,
            host=self._host(index),
            pid=self._pids.get(index, 0),
            state=state,
            step_id=None,
            step_seconds=0.0,
            steps_done=0,
            busy_seconds=0.0,
            layers_done=0,
            layers=0,
            resident_bytes=0,
            detail=detail,
        )

    async def _watch(self, on_progress: OnStageProgress) -> None:
        told: dict[int, int] = {}
        while True:
            for health in await self.health():
                if health.state != "loading":
                    continue
                self._note_pid(health)
                if told.get(health.stage) != health.layers_done:
                    told[health.stage] = health.layers_done
                    layers = len(self._setups[health.stage].spec.layers)
                    on_progress(self._progress(health.stage, "loading", health.layers_done, layers))
            await asyncio.sleep(PROGRESS_SECONDS)

    def _note_pid(self, health: StageHealth) -> None:
        if self._placement.seats[health.stage].host.node_id == self._here:
            self._pids[health.stage] = health.pid

    def _progress(self, index: int, phase: Phase, done: int, layers: int) -> StageProgress:
        return StageProgress(
            stage=index,
            host=self._host(index),
            rows=self._setups[index].rows,
            phase=phase,
            layers_done=done,
            layers=layers,
        )

    def _host(self, index: int) -> str:
        return self._setups[index].identity.host

    async def _all(self, task: str, refs: Sequence["ObjectRef[Result]"], deadline: float) -> list[Result]:
        """The stages' answers, in order. The first failure, or the deadline, raises; `task` says what was asked."""
        asked = [asyncio.ensure_future(_answer(ref)) for ref in refs]
        timeout = max(0.0, deadline - asyncio.get_running_loop().time())
        try:
            done, pending = await asyncio.wait(asked, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
            for index, answer in enumerate(asked):
                error = answer.exception() if answer in done else None
                if error is not None:
                    raise self._start_error(index, task, error) from error
            if pending:
                raise StartError(await self._late([asked.index(answer) for answer in pending], task))
            return [answer.result() for answer in asked]
        finally:
            for answer in asked:
                answer.cancel()

    def _start_error(self, index: int, task: str, error: BaseException) -> GalaxylineError:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, GalaxylineError) and not isinstance(cause, LinkError | ProtocolError | StartError):
            return cause
        told = _death(cause) if isinstance(cause, RayActorError) else f"{type(cause).__name__}: {cause}"
        if isinstance(cause, GalaxylineError):
            told = str(cause)
        return StartError(f"Stage {index} on {self._host(index)} could not {task}: {told}")

    async def _late(self, late: list[int], task: str) -> str:
        healths = await self.health()
        names = []
        for index in sorted(late):
            health = healths[index]
            how = health.detail if health.state in {"silent", "dead"} else f"{health.layers_done} layers loaded"
            names.append(f"stage {index} on {self._host(index)} ({how})")
        return f"{'; '.join(names)}: did not {task} in time. Look at its log, or allow more time for the start."


async def _answer(ref: "ObjectRef[Result]") -> Result:
    return await ref


async def _settled(answer: Coroutine[Any, Any, None]) -> None:
    """A stage that is dead already needs no close, and one that cannot close itself is killed."""
    try:
        await answer
    except RayActorError:
        return
    except RayTaskError as error:
        _log.warning("stage did not close by itself", cause=str(error.cause))


def _death(error: RayActorError) -> str:
    """Why an actor is gone, as one sentence: Ray tells whole stories."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if error.actor_init_failed:
        return f"its process could not be set up: {lines[-1]}"
    return "its process died"


def _kill(actor: "ActorHandle[StageActor]") -> None:
    ray.kill(actor, no_restart=True)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
