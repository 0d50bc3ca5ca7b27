"""What several stages were asked at once, awaited with patience that ends. The module imports Ray; see `cluster`."""

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

"""Between two looks at the stages that have not answered; a look takes as long again where one says nothing."""


class StageAnswers:
    """Awaits the answers of stages; whoever does not give one is named."""

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
        """The answers of these stages. `task` says what was asked.

        The first failure raises, and so does the loop's clock when it shows `deadline`, or a stage that does not even
        say how it does for `silence_s` seconds; it may take `starting_s` until it says so for the first time, which
        those `heard` have done.
        """
        asked = {index: asyncio.ensure_future(answer(ref)) for index, ref in refs.items()}
        answering = asyncio.ensure_future(self._within(task, asked, deadline))
        missing = asyncio.ensure_future(self._first_absent(task, asked, silence_s, starting_s or silence_s, heard))
        try:
            await asyncio.wait({answering, missing}, return_when=asyncio.FIRST_COMPLETED)
            return answering.result() if answering.done() else missing.result()
        finally:
            for waiting in (answering, missing, *asked.values()):
                waiting.cancel()

    async def _within(self, task: str, asked: "Mapping[int, asyncio.Future[Result]]", deadline: float) -> list[Result]:
        timeout = max(0.0, deadline - asyncio.get_running_loop().time())
        done, pending = await asyncio.wait(asked.values(), timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
        for index, given in asked.items():
            error = given.exception() if given in done else None
            if error is not None:
                raise self._start_error(index, task, error) from error
        if pending:
            raise StartError(await self._late([i for i, given in asked.items() if given in pending], task))
        return [given.result() for given in asked.values()]

    async def _first_absent(
        self,
        task: str,
        asked: "Mapping[int, asyncio.Future[Result]]",
        silence_s: float,
        starting_s: float,
        heard: Collection[int],
    ) -> NoReturn:
        """Raises StartError for the first stage that is stopped, or worse: no answer of its can be hoped for.

        Silence is counted in looks, so that a machine that stood still does not look like a stage that did.
        """
        missed: Counter[int] = Counter()
        known = set(heard)
        while True:
            await asyncio.sleep(POLL_SECONDS)
            late = [index for index, given in asked.items() if not given.done()]
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
        told = death(cause) if isinstance(cause, RayActorError) else f"{type(cause).__name__}: {cause}"
        if isinstance(cause, GalaxylineError):
            told = str(cause)
        return StartError(f"Stage {index} on {self._host(index)} could not {task}: {told}")

    async def _late(self, late: Sequence[int], task: str) -> str:
        healths = dict(zip(late, await asyncio.gather(*(self._health(index) for index in late)), strict=True))
        names = []
        # Where stages wait for each other, one that says nothing at all is the one that all others wait for.
        absent = [index for index in late if healths[index].state in {"silent", "dead"}]
        for index in sorted(absent or late):
            health = healths[index]
            how = health.detail if health.state in {"silent", "dead"} else f"{health.layers_done} layers loaded"
            names.append(f"stage {index} on {self._host(index)} ({how})")
        return f"{'; '.join(names)}: did not {task} in time. Look at its log, or allow more time for the start."


async def answer(ref: "ObjectRef[Result]") -> Result:
    """What an actor returns. Raises what it raised, or RayActorError where it is gone."""
    return await ref


def death(error: RayActorError) -> str:
    """Why an actor is gone, as one sentence: Ray tells whole stories."""
    if error.actor_init_failed:
        return f"its process could not be set up: {last_line(str(error))}"
    return "its process died"
