"""The replies of several stages to one call, awaited until a deadline. The module imports Ray; see `cluster`."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import NoReturn, TypeVar

from ray import ObjectRef
from ray.exceptions import RayActorError, RayTaskError

from actors.cluster.ray_private import last_line, setup_error
from actors.errors import LinkError, ProtocolError, StartError
from actors.stage.health import StageHealth
from weights.errors import GalaxylineError

Result = TypeVar("Result")

POLL_SECONDS = 1.0
"""Seconds between two polls of the stages that have not replied; a poll takes as long again where one is silent."""


class StageReplies:
    """Awaits the replies of stages, and names those that do not reply."""

    def __init__(self, host: Callable[[int], str], health: Callable[[int], Awaitable[StageHealth]]) -> None:
        """`host` and `health` are those of a stage, by its index."""
        self._host = host
        self._health = health

    async def all(
        self,
        task: str,
        refs: "Mapping[int, ObjectRef[Result]]",
        deadline: float,
        silence_s: float,
        starting_s: float | None = None,
        heard: Collection[int] = (),
    ) -> list[Result]:
        """Returns the replies of these stages. `task` is the call in words, for errors.

        The first failure raises. StartError is raised when the loop's clock shows `deadline`, and when a stage does not
        even report its health for `silence_s` seconds. Until its first report it may take `starting_s`; those `heard`
        have reported already.
        """
        pending = {index: asyncio.ensure_future(reply(ref)) for index, ref in refs.items()}
        replying = asyncio.ensure_future(self._within(task, pending, deadline))
        missing = asyncio.ensure_future(self._first_absent(task, pending, silence_s, starting_s or silence_s, heard))
        try:
            await asyncio.wait({replying, missing}, return_when=asyncio.FIRST_COMPLETED)
            return replying.result() if replying.done() else missing.result()
        finally:
            for waiting in (replying, missing, *pending.values()):
                waiting.cancel()

    async def _within(
        self, task: str, replies: "Mapping[int, asyncio.Future[Result]]", deadline: float
    ) -> list[Result]:
        timeout = max(0.0, deadline - asyncio.get_running_loop().time())
        done, pending = await asyncio.wait(replies.values(), timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
        for index, given in replies.items():
            error = given.exception() if given in done else None
            if error is not None:
                raise self._start_error(index, task, error) from error
        if pending:
            raise StartError(await self._late([i for i, given in replies.items() if given in pending], task))
        return [given.result() for given in replies.values()]

    async def _first_absent(
        self,
        task: str,
        replies: "Mapping[int, asyncio.Future[Result]]",
        silence_s: float,
        starting_s: float,
        heard: Collection[int],
    ) -> NoReturn:
        """Raises StartError for the first stage that is stopped, or worse: it will not reply.

        Silence is counted in polls, so that a machine that stood still does not look like a stage that did.
        """
        missed: Counter[int] = Counter()
        known = set(heard)
        while True:
            await asyncio.sleep(POLL_SECONDS)
            late = [index for index, given in replies.items() if not given.done()]
            for health in await asyncio.gather(*(self._health(index) for index in late)):
                index = health.stage
                if health.state != "silent":
                    known.add(index)
                    missed[index] = 0
                    continue
                missed[index] += 1
                allowed_s = silence_s if index in known else starting_s
                if 2 * POLL_SECONDS * missed[index] > allowed_s:
                    raise StartError(
                        f"Stage {index} on {self._host(index)} did not {task}: it has said nothing for {allowed_s:g} s."
                    )

    def _start_error(self, index: int, task: str, error: BaseException) -> GalaxylineError:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, GalaxylineError) and not isinstance(cause, LinkError | ProtocolError | StartError):
            return cause
        if isinstance(cause, RayActorError) and cause.actor_init_failed:
            return setup_error(index, self._host(index), str(cause))
        if isinstance(cause, RayActorError):
            why = death_cause(cause)
        else:
            why = str(cause) if isinstance(cause, GalaxylineError) else f"{type(cause).__name__}: {cause}"
        return StartError(f"Stage {index} on {self._host(index)} could not {task}: {why}")

    async def _late(self, late: Sequence[int], task: str) -> str:
        healths = dict(zip(late, await asyncio.gather(*(self._health(index) for index in late)), strict=True))
        names = []
        # Where stages wait for each other, one that does not even report its health is what the others wait for.
        absent = [index for index in late if healths[index].state in {"silent", "dead"}]
        for index in sorted(absent or late):
            health = healths[index]
            how = health.detail if health.state in {"silent", "dead"} else f"{health.layers_done} layers loaded"
            names.append(f"stage {index} on {self._host(index)} ({how})")
        return f"{'; '.join(names)}: did not {task} in time. Look at its log, or allow more time for the start."


async def reply(ref: "ObjectRef[Result]") -> Result:
    """Returns what an actor returns. Raises what it raised, or RayActorError where it is gone."""
    return await ref


def death_cause(error: RayActorError) -> str:
    """Returns why an actor is gone, as one sentence in place of Ray's several."""
    if error.actor_init_failed:
        return f"its process could not be set up: {last_line(str(error))}"
    return "its process died"
