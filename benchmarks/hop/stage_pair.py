"""A whole hop: two stages as in a pipeline, but in processes of the benchmark."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import structlog

from actors.errors import LinkError
from actors.sockets.host import HostLink
from actors.sockets.link import Arrival
from actors.sockets.listener import Address, HostListener, UnixAddress, connect
from actors.stage.process import CoreShare
from actors.stage.server import StageServer
from actors.stage.setup import ENGINE, StageIdentity
from benchmarks.hop.steps import BYTES_PER_TOKEN, DTYPE, EPOCH, Secret, step_of
from benchmarks.support.null_stage import NullStage
from benchmarks.support.peer import START_SECONDS, Pipe, answer, running_peer, wait_for_end
from stages.plan import StageSpec
from stages.step import StageFailure, StepResult

STAGES = 2
STEP_SECONDS = 60.0


class StagePair:
    """Stage 0 and stage 1, with the benchmark in place of the engine."""

    def __init__(self, to_first: HostLink, results: "_Results") -> None:
        self._to_first = to_first
        self._results = results

    async def hop_seconds(self, tokens: int, count: int) -> list[float]:
        """Seconds from the end of stage 0's computing to the beginning of stage 1's, for `count` steps in turn.

        One more step goes first and is not counted.
        """
        times = []
        for step_id in range(count + 1):
            await asyncio.wait_for(self._to_first.send(step_of(step_id, tokens)), STEP_SECONDS)
            first, second = (await self._results.next()).timings
            times.append((second.began_ns - first.ended_ns) * 1e-9)
        return times[1:]


@contextlib.asynccontextmanager
async def stage_pair(directory: Path, shares: list[CoreShare]) -> AsyncIterator[StagePair]:
    """Runs both stages, each on its share of the cores; their sockets are in `directory`."""
    addresses = [UnixAddress(str(directory / f"{index}" / "link.sock")) for index in range(STAGES + 1)]
    secret = Secret.new()
    identities = [_identity(index, secret) for index in range(STAGES)]
    results = _Results()
    upstream, downstream = identities[0].upstream_terms(), identities[-1].downstream_terms()
    last_terms = msgspec.structs.replace(downstream, name=ENGINE, peer=downstream.name)
    first_terms = msgspec.structs.replace(upstream, name=ENGINE, peer=upstream.name)
    listener = HostListener.open(addresses[-1], last_terms, results)
    with contextlib.ExitStack() as peers:
        try:
            # The last stage is started first, as a stage connects to one that listens already.
            for identity in reversed(identities):
                at = identity.index
                peer = peers.enter_context(
                    running_peer(_run_stage, shares[at], identity, addresses[at], addresses[at + 1])
                )
                await asyncio.to_thread(answer, peer)
            from_last = await asyncio.wait_for(listener.accepted(), START_SECONDS)
            to_first = await connect(addresses[0], first_terms, results)
            try:
                yield StagePair(to_first, results)
            finally:
                to_first.close()
                from_last.close()
        finally:
            listener.close()


class _Results:
    """The messages from the last stage."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[StepResult | Exception] = asyncio.Queue()

    async def next(self) -> StepResult:
        """Waits for the next result. Raises LinkError if a stage failed, or left."""
        result = await asyncio.wait_for(self._queue.get(), STEP_SECONDS)
        if isinstance(result, Exception):
            raise result
        return result

    def arrived(self, arrival: Arrival) -> None:
        message = arrival.message
        arrival.release()
        if isinstance(message, StepResult):
            self._queue.put_nowait(message)
        elif isinstance(message, StageFailure):
            self._queue.put_nowait(LinkError(f"Stage {message.stage} failed: {message.cause}."))

    def lost(self, error: LinkError) -> None:
        self._queue.put_nowait(error)


def _identity(index: int, secret: Secret) -> StageIdentity:
    return StageIdentity(
        index=index,
        stages=STAGES,
        host="here",
        epoch=EPOCH,
        secret=secret.value,
        dtype=DTYPE,
        bytes_per_token=BYTES_PER_TOKEN,
    )


def _run_stage(pipe: Pipe, identity: StageIdentity, address: Address, downstream: Address) -> None:
    spec = StageSpec(
        index=identity.index, stages=identity.stages, first_layer=identity.index, end_layer=identity.index + 1
    )
    # The benchmark gets failures as messages, and a neighbour that leaves at the end is not one.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    server = StageServer(identity)
    server.load(lambda _: NullStage(spec, identity.bytes_per_token)).result(START_SECONDS)
    server.listen(address).result(START_SECONDS)
    server.connect(downstream).result(START_SECONDS)
    pipe.send("ready")
    wait_for_end(pipe)
    server.close()
