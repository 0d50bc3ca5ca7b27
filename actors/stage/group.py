"""The actors of one pipeline, which are made, called and ended together. The module imports Ray; see `cluster`."""

import asyncio
import math
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, cast

import msgspec
import ray
import structlog
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster.cluster import Cluster
from actors.cluster.placement import ROWS
from actors.cluster.placement_group import Placement
from actors.cluster.process_end import kill_actor, wait_until_gone
from actors.release import own_release
from actors.sockets.listener import Address
from actors.stage.actor import StageActor
from actors.stage.health import Phase, StageHealth, StageProgress, State
from actors.stage.mesh_hop import Transfer
from actors.stage.replies import StageReplies, death_cause, reply
from actors.stage.setup import StageSetup
from actors.stage.spares import Spares
from stages.kv.inventory import Inventory

OnStageProgress = Callable[[StageProgress], None]

HEALTH_SECONDS = 0.9
"""How long a stage has to report its health. Whoever asks twice is to know within two seconds."""
RESET_SECONDS = 10.0
"""A step that is under way when another stage fails has to end first; long prompts take seconds."""
ABSENT_SECONDS = 10.0
"""How long a stage that was called may not even report its health: then it is stopped, or stuck in a start."""
STARTING_SECONDS = 30.0
"""The same for a stage that is only starting: its imports take 2 s, and much longer where all stages start at once.

It also applies while a pipeline loads for the first time: nobody is served yet, and stages that run at Ray's default
niceness of 15, as under a Ray that somebody else started, get little of a busy host.
"""
PROGRESS_SECONDS = 0.2
CLOSE_SECONDS = 5.0
"""A little more than a stage server takes for its own close."""

_log = structlog.get_logger()


class StageGroup:
    """The handles of all stages, in order. Every call has a deadline, and a stage that misses it is named.

    With `keeps_blocks`, what stages keep in their hosts' memory outlives them, for others that take their place.
    """

    def __init__(self, cluster: Cluster, placement: Placement, setups: Sequence[StageSetup], here: str) -> None:
        """`here` is the node of this process."""
        self._cluster = cluster
        self._placement = placement
        self._setups = list(setups)
        self._here = here
        self._pids: dict[int, int] = {}
        self.keeps_blocks = False
        self._replies = StageReplies(self._host, self._health)
        # Stages of an MPI world wait for each other inside of MPI, where Python's other threads may stand still.
        uses_mpi = any(setup.membership is not None for setup in setups)
        self._silence_s = math.inf if uses_mpi else max(ABSENT_SECONDS, setups[0].identity.silence_s)
        self._remote: ActorClass[StageActor] = ray.remote(StageActor)
        self._actors = [
            self._make(setup, placed.bundle) for setup, placed in zip(setups, placement.stages, strict=True)
        ]

    def _make(self, setup: StageSetup, bundle: int) -> "ActorHandle[StageActor]":
        handle = self._remote.options(
            num_cpus=0,
            resources={ROWS: len(setup.rows)},
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement.group_of(setup.spec.index), bundle),
        ).remote(own_release(), setup.identity.host, msgspec.msgpack.encode(setup))
        return cast("ActorHandle[StageActor]", handle)

    async def load(self, deadline: float, on_progress: OnStageProgress) -> None:
        """Loads all stages side by side until the loop's clock shows `deadline`.

        Raises StartError naming stage and host, or the error of the weights, the plan or the device.
        """
        silence_s = max(STARTING_SECONDS, self._silence_s)
        await self._load(range(len(self._actors)), deadline, on_progress, silence_s=silence_s, starting_s=math.inf)

    async def reset(self, epoch: int, secret: bytes, kill: Collection[int]) -> list[int]:
        """Takes all stages but those to `kill` out of the chain, to be joined anew.

        Returns those that cannot be joined, those to `kill` among them. A stage may have to end a step first; one that
        does not within RESET_SECONDS counts as lost.
        """
        self._setups = [
            msgspec.structs.replace(setup, identity=msgspec.structs.replace(setup.identity, epoch=epoch, secret=secret))
            for setup in self._setups
        ]
        kept = [index for index in range(len(self._actors)) if index not in kill]
        resets = {
            index: asyncio.ensure_future(reply(self._actors[index].reset.remote(epoch, secret))) for index in kept
        }
        if resets:
            await self._wait_for_resets(resets)
        lost = [index for index, reset in resets.items() if not reset.done() or reset.exception() is not None]
        for reset in resets.values():
            reset.cancel()
        return sorted([*kill, *lost])

    async def _wait_for_resets(self, resets: "Mapping[int, asyncio.Future[None]]") -> None:
        """Waits until all are done, or those that are not are silent: a stage that is stopped does not end its step."""
        silence_s = min(RESET_SECONDS, self._setups[0].identity.silence_s)
        _, pending = await asyncio.wait(resets.values(), timeout=silence_s)
        waiting = [index for index, reset in resets.items() if reset in pending]
        healths = await asyncio.gather(*(self._health(index) for index in waiting))
        if busy := [resets[health.stage] for health in healths if health.state != "silent"]:
            await asyncio.wait(busy, timeout=RESET_SECONDS - silence_s)

    async def kill(self, indexes: Sequence[int]) -> None:
        """Ends the processes of these stages."""
        for index in indexes:
            await kill_actor(self._cluster, self._actors[index], self._pids.pop(index, None))

    async def replace(
        self, setups: Mapping[int, StageSetup], spares: Spares, deadline: float, on_progress: OnStageProgress
    ) -> None:
        """Loads other processes, spare or new, in the place of those that were killed.

        Raises StartError, or what loading raises.
        """
        were_spare = []
        for index, setup in setups.items():
            self._setups[index] = setup
            placed = self._placement.stages[index]
            spare = await spares.assign(placed.host, setup)
            if spare is None:
                self._actors[index] = self._make(setup, placed.bundle)
                continue
            were_spare.append(index)
            self._actors[index] = spare.actor
            if spare.pid is not None:
                self._note_pid(index, spare.pid)
        await self._load(
            list(setups),
            deadline,
            on_progress,
            silence_s=self._silence_s,
            starting_s=STARTING_SECONDS,
            heard=were_spare,
        )

    async def _load(
        self,
        indexes: Sequence[int],
        deadline: float,
        on_progress: OnStageProgress,
        *,
        silence_s: float,
        starting_s: float,
        heard: Collection[int] = (),
    ) -> None:
        """Loads these stages. Those `heard` have replied before, so they may not be silent for `starting_s`."""
        for index in indexes:
            on_progress(self._progress(index, "starting", 0, len(self._setups[index].spec.layers)))
        watching = asyncio.create_task(self._watch(indexes, on_progress))
        try:
            refs = {i: self._actors[i].load.remote() for i in indexes}
            await self._replies.all("load its weights", refs, deadline, silence_s, max(starting_s, silence_s), heard)
        finally:
            watching.cancel()
        for index in range(len(self._actors)):
            layers = len(self._setups[index].spec.layers)
            on_progress(self._progress(index, "connecting", layers, layers))
        for health in await self.health():
            self._note_pid(health.stage, health.pid)

    async def listen(self, addresses: Sequence[Address], deadline: float) -> list[Address]:
        """Opens one address a stage; returns those they were bound to. Raises StartError."""
        refs = {i: self._actors[i].listen.remote(address) for i, address in enumerate(addresses)}
        return await self._replies.all("open its socket", refs, deadline, self._silence_s)

    async def connect(self, addresses: Sequence[Address], deadline: float) -> None:
        """Joins every stage to the address beside it. Raises StartError."""
        refs = {i: self._actors[i].connect.remote(address) for i, address in enumerate(addresses)}
        await self._replies.all("join the next stage", refs, deadline, self._silence_s)

    async def join_meshes(self, deadline: float) -> None:
        """Makes all sockets between meshes, then waits until every stage has its own. Raises StartError."""
        opened = {i: actor.open_mesh_sockets.remote() for i, actor in enumerate(self._actors)}
        await self._replies.all("open its mesh sockets", opened, deadline, self._silence_s)
        passed = {i: actor.pass_barrier.remote() for i, actor in enumerate(self._actors)}
        await self._replies.all("pass the barrier", passed, deadline, self._silence_s)

    async def transfers(self) -> list[list[Transfer]]:
        """Returns what has gone through each stage's mesh sockets lately."""
        return list(await asyncio.gather(*(reply(actor.transfers.remote()) for actor in self._actors)))

    async def health(self) -> list[StageHealth]:
        """Returns the health of every stage, in order, within about a second."""
        return list(await asyncio.gather(*(self._health(index) for index in range(len(self._actors)))))

    async def inventories(self, versions: Sequence[int]) -> list[Inventory | None]:
        """Returns what every stage keeps beside its device since the versions; None for one that does not answer."""
        return list(await asyncio.gather(*(self._inventory(index, version) for index, version in enumerate(versions))))

    async def close(self) -> None:
        """Ends the actors and gives back their rows; waits until the processes on this host are gone.

        Raises PipelineError if they do not go.
        """
        if not self._cluster.is_lost:
            closings = [actor.close.remote(keeps_blocks=self.keeps_blocks) for actor in self._actors]
            closing = [asyncio.ensure_future(_settled(reply(each))) for each in closings]
            await asyncio.wait(closing, timeout=CLOSE_SECONDS)
        for actor in self._actors:
            await kill_actor(self._cluster, actor, None)
        await self._placement.remove()
        await wait_until_gone(self._cluster, self._pids.values())

    async def _health(self, index: int) -> StageHealth:
        try:
            health: StageHealth = await asyncio.wait_for(reply(self._actors[index].health.remote()), HEALTH_SECONDS)
        except asyncio.TimeoutError:
            return self._absent(index, "silent", f"no answer within {HEALTH_SECONDS:g} s")
        except RayActorError as error:
            return self._absent(index, "dead", death_cause(error))
        return health

    async def _inventory(self, index: int, version: int) -> Inventory | None:
        try:
            return await asyncio.wait_for(reply(self._actors[index].inventory.remote(version)), HEALTH_SECONDS)
        except (asyncio.TimeoutError, RayActorError):
            return None

    def _absent(self, index: int, state: State, detail: str) -> StageHealth:
        return StageHealth(
            stage=index,
            host=self._host(index),
            pid=self._pids.get(index, 0),
            state=state,
            step_id=None,
            step_seconds=0.0,
            received_step=None,
            steps_done=0,
            busy_seconds=0.0,
            layers_done=0,
            layers=0,
            resident_bytes=0,
            detail=detail,
        )

    async def _watch(self, indexes: Sequence[int], on_progress: OnStageProgress) -> None:
        await asyncio.gather(*(self._watch_one(index, on_progress) for index in indexes))

    async def _watch_one(self, index: int, on_progress: OnStageProgress) -> None:
        """Reports a stage's progress. Its health is asked for again only once it has replied: calls would pile up until
        its process is up, which takes long where many start at once."""
        reported: int | None = None
        while True:
            try:
                health = await reply(self._actors[index].health.remote())
            except RayActorError:
                return  # The call that loads its weights raises why.
            if health.state == "loading":
                self._note_pid(index, health.pid)
                if reported != health.layers_done:
                    reported = health.layers_done
                    on_progress(self._progress(index, "loading", reported, len(self._setups[index].spec.layers)))
            await asyncio.sleep(PROGRESS_SECONDS)

    def _note_pid(self, index: int, pid: int) -> None:
        if self._placement.stages[index].host.node_id == self._here:
            self._pids[index] = pid

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


async def _settled(closing: Coroutine[Any, Any, None]) -> None:
    """Awaits a stage's own close. One that is dead already needs none, and one that cannot close itself is killed."""
    try:
        await closing
    except RayActorError:
        return
    except RayTaskError as error:
        _log.warning("stage did not close by itself", cause=str(error.cause))
