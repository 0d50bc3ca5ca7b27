"""A process on each host that waits to become a stage, so that to replace a lost stage takes no interpreter's start.

The module imports Ray; see `cluster`.
"""

import asyncio
from collections.abc import Iterable
from typing import cast

import msgspec
import ray
import structlog
from ray.actor import ActorClass, ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.cluster import Cluster
from actors.cluster.placement import StagePlacement
from actors.cluster.process_end import kill_actor, wait_until_gone
from actors.options import PipelineOptions
from actors.release import own_release
from actors.stage.actor import StageActor
from actors.stage.process import Preparation
from actors.stage.replies import death_cause, reply
from actors.stage.setup import StageSetup
from stages.step import Host

ANSWER_SECONDS = 2.0
"""An import may hold the interpreter for most of a second."""
SILENT_SECONDS = 10.0
"""How long a spare that nobody needs may take to answer: it may be that the whole machine is busy."""
PAUSE_SECONDS = 30.0
PREPARE_SECONDS = 120.0
"""A busy host takes 10 s for the imports, and longer where they are not in memory yet."""

_log = structlog.get_logger()


class Spare:
    """A process that owns no rows; `pid` is known once it is up."""

    def __init__(self, host: Host, preparation: Preparation) -> None:
        self.host = host
        self.pid: int | None = None
        remote: ActorClass[StageActor] = ray.remote(StageActor)
        made = remote.options(
            num_cpus=0,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(host.node_id, soft=False),
        ).remote(own_release(), host.name, None)
        self.actor = cast("ActorHandle[StageActor]", made)
        self.made_at = asyncio.get_running_loop().time()
        self.ready = asyncio.ensure_future(self._prepare(preparation))

    @property
    def is_fresh(self) -> bool:
        """Whether it was started lately: where none can get ready, they follow each other slowly."""
        return asyncio.get_running_loop().time() - self.made_at < PAUSE_SECONDS

    async def _prepare(self, preparation: Preparation) -> None:
        packed = msgspec.msgpack.encode(preparation)
        self.pid = await asyncio.wait_for(reply(self.actor.pid.remote()), PREPARE_SECONDS)
        await asyncio.wait_for(reply(self.actor.prepare.remote(packed)), PREPARE_SECONDS)
        _log.info("a spare process waits", host=self.host.name, pid=self.pid)

    async def assign(self, setup: StageSetup) -> None:
        """Makes the process the stage; one that still imports loads its weights when it has done so.

        Raises RayError, or asyncio.TimeoutError, where it does not answer at once.
        """
        if self.ready.done():
            await self.ready
        await asyncio.wait_for(reply(self.actor.assign.remote(msgspec.msgpack.encode(setup))), ANSWER_SECONDS)

    async def trouble(self) -> str | None:
        """Returns why a spare that was ready, or failed to get so, is of no use; None where it is."""
        try:
            await self.ready
            await asyncio.wait_for(reply(self.actor.pid.remote()), SILENT_SECONDS)
        except (RayError, asyncio.TimeoutError) as error:
            return _cause(error)
        return None


class Spares:
    """The spares of one pipeline: none before the first `provide`, none after `close`.

    There are never any where `options` want none, nor in an MPI world, whose stages all start anew, nor for stages
    whose environments differ, as imports may have read these.
    """

    def __init__(self, cluster: Cluster, options: PipelineOptions, here: str) -> None:
        """`here` is the node of this process."""
        self._cluster = cluster
        self._options = options
        self._here = here
        self._spares: dict[str, Spare] = {}
        self._placements: list[StagePlacement] = []

    def provide(self, placements: Iterable[StagePlacement]) -> None:
        """Starts a spare on each host of these stages that has none; does not wait for it."""
        if not self._are_wanted:
            return
        options = self._options
        self._placements = list(placements)
        for placed in self._placements:
            if placed.host.node_id not in self._spares:
                preparation = Preparation(
                    device=options.cluster.device,
                    runner=options.runner,
                    neighbours=placed.neighbours,
                    environment=options.environment(0),
                    stderr=options.stderr,
                )
                self._spares[placed.host.node_id] = Spare(placed.host, preparation)

    @property
    def _are_wanted(self) -> bool:
        options = self._options
        are_alike = all(environment == options.environment(0) for environment in options.environments)
        return options.cluster.spare and options.transport == "host" and are_alike

    async def assign(self, host: Host, setup: StageSetup) -> Spare | None:
        """Makes the host's spare this stage and returns it, for the caller to end; None where none answers.

        A spare whose process is only starting is left alone: it is for the next stage that is lost.
        """
        spare = self._spares.get(host.node_id)
        if spare is None:
            return None
        if spare.pid is None and not spare.ready.done():
            _log.info("the spare process is only starting", host=host.name, stage=setup.spec.index)
            return None
        try:
            await spare.assign(setup)
        except (RayError, asyncio.TimeoutError) as error:
            _log.warning("the spare process is of no use", host=host.name, pid=spare.pid, cause=_cause(error))
            self._forget(spare)
            await kill_actor(self._cluster, spare.actor, self._local_pid(spare))
            return None
        self._forget(spare)
        _log.info("the spare process becomes the stage", host=host.name, pid=spare.pid, stage=setup.spec.index)
        return spare

    async def replace_lost(self) -> None:
        """Replaces spares that have died, could not import, or do not answer; each is logged."""
        for spare in [spare for spare in self._spares.values() if spare.ready.done() and not spare.ready.cancelled()]:
            cause = await spare.trouble()
            # It may have become a stage meanwhile.
            if cause is None or self._spares.get(spare.host.node_id) is not spare:
                continue
            if spare.ready.exception() is not None and spare.is_fresh:
                continue
            _log.warning(
                "a spare process is lost: another one starts", host=spare.host.name, pid=spare.pid, cause=cause
            )
            self._forget(spare)
            await kill_actor(self._cluster, spare.actor, self._local_pid(spare))
            self.provide(self._placements)

    async def pids(self) -> list[int]:
        """Returns the ids of all spare processes, once they have imported what they need.

        Raises RayError where one could not.
        """
        spares = list(self._spares.values())
        await asyncio.gather(*(asyncio.shield(spare.ready) for spare in spares))
        return [spare.pid for spare in spares if spare.pid is not None]

    async def close(self) -> None:
        """Ends all spares; waits until those of this host are gone. Raises PipelineError if they stay."""
        spares, self._spares = list(self._spares.values()), {}
        for spare in spares:
            spare.ready.cancel()
            # By Ray, which logs the death of a worker that it has not ended itself.
            await kill_actor(self._cluster, spare.actor, None)
        await asyncio.gather(*(spare.ready for spare in spares), return_exceptions=True)
        await wait_until_gone(self._cluster, [pid for pid in map(self._local_pid, spares) if pid is not None])

    def _forget(self, spare: Spare) -> None:
        spare.ready.cancel()
        del self._spares[spare.host.node_id]

    def _local_pid(self, spare: Spare) -> int | None:
        return spare.pid if spare.host.node_id == self._here else None


def _cause(error: Exception) -> str:
    if isinstance(error, RayActorError):
        return death_cause(error)
    if isinstance(error, RayTaskError):
        return str(error.cause)
    return str(error) or "it did not answer in time"
