"""One process a host that waits to become a stage, so that a stage which is lost costs no start of an interpreter.

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
from actors.cluster.process_end import kill, until_gone
from actors.options import PipelineOptions
from actors.release import own_release
from actors.stage.actor import StageActor, StageSetup
from actors.stage.preparation import Preparation
from actors.stage.replies import answer, death
from stages.step import Host

ANSWER_SECONDS = 2.0
"""An import may hold the interpreter for most of a second."""
PREPARE_SECONDS = 120.0
"""A busy host takes 10 s for the imports, and a disk that has not read them yet some more."""

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
        self.ready = asyncio.ensure_future(self._prepare(preparation))

    async def _prepare(self, preparation: Preparation) -> None:
        packed = msgspec.msgpack.encode(preparation)
        self.pid = await asyncio.wait_for(answer(self.actor.pid.remote()), PREPARE_SECONDS)
        await asyncio.wait_for(answer(self.actor.prepare.remote(packed)), PREPARE_SECONDS)
        _log.info("a spare process waits", host=self.host.name, pid=self.pid)

    async def take_up(self, setup: StageSetup) -> None:
        """Makes it the stage; one that still imports loads its weights when it has done so.

        Raises RayError, or asyncio.TimeoutError, where it does not answer at once.
        """
        if self.ready.done():
            await self.ready
        await asyncio.wait_for(answer(self.actor.take_up.remote(msgspec.msgpack.encode(setup))), ANSWER_SECONDS)


class Spares:
    """Those of one pipeline: none before the first `provide`, none after `close`.

    Where `options` want none there never are any, nor in an MPI world, whose stages all start anew, nor for stages
    whose environments differ, which imports may have read.
    """

    def __init__(self, cluster: Cluster, options: PipelineOptions, here: str) -> None:
        """`here` is the node of this process."""
        self._cluster = cluster
        self._options = options
        self._here = here
        self._spares: dict[str, Spare] = {}

    def provide(self, placements: Iterable[StagePlacement]) -> None:
        """Starts one on each host of these that has none; does not wait for it."""
        if not self._are_wanted:
            return
        options = self._options
        for placed in placements:
            if placed.host.node_id not in self._spares:
                preparation = Preparation(
                    device=options.device,
                    runner=options.runner,
                    neighbours=placed.neighbours,
                    environment=options.environment(0),
                )
                self._spares[placed.host.node_id] = Spare(placed.host, preparation)

    @property
    def _are_wanted(self) -> bool:
        options = self._options
        are_alike = all(environment == options.environment(0) for environment in options.environments)
        return options.spare and options.transport == "host" and are_alike

    async def take(self, host: Host, setup: StageSetup) -> Spare | None:
        """The host's spare as this stage, from now on the caller's to end; None where there is none that answers.

        One whose process is only starting is left alone: it is for the next stage that is lost.
        """
        spare = self._spares.get(host.node_id)
        if spare is None:
            return None
        if spare.pid is None and not spare.ready.done():
            _log.info("the spare process is only starting", host=host.name, stage=setup.spec.index)
            return None
        try:
            await spare.take_up(setup)
        except (RayError, asyncio.TimeoutError) as error:
            _log.warning("the spare process is of no use", host=host.name, pid=spare.pid, cause=_cause(error))
            self._forget(spare)
            await kill(self._cluster, spare.actor, self._local_pid(spare))
            return None
        self._forget(spare)
        _log.info("the spare process becomes the stage", host=host.name, pid=spare.pid, stage=setup.spec.index)
        return spare

    async def pids(self) -> list[int]:
        """Of all there are, once they have imported what they need. Raises RayError where one could not."""
        spares = list(self._spares.values())
        await asyncio.gather(*(asyncio.shield(spare.ready) for spare in spares))
        return [spare.pid for spare in spares if spare.pid is not None]

    async def close(self) -> None:
        """Ends them all; waits until those of this host are gone. Raises PipelineError if they do not go."""
        spares, self._spares = list(self._spares.values()), {}
        for spare in spares:
            spare.ready.cancel()
            # By Ray, which tells of a worker's death that it has not brought about.
            await kill(self._cluster, spare.actor, None)
        await asyncio.gather(*(spare.ready for spare in spares), return_exceptions=True)
        await until_gone([pid for pid in map(self._local_pid, spares) if pid is not None])

    def _forget(self, spare: Spare) -> None:
        spare.ready.cancel()
        del self._spares[spare.host.node_id]

    def _local_pid(self, spare: Spare) -> int | None:
        return spare.pid if spare.host.node_id == self._here else None


def _cause(error: Exception) -> str:
    if isinstance(error, RayActorError):
        return death(error)
    if isinstance(error, RayTaskError):
        return str(error.cause)
    return str(error) or "it did not answer in time"
