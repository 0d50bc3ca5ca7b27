"""`python -m benchmarks.sampling`: what drawing tokens takes of a last stage whose steps take a given time.

128 users of DeepSeek-R1's vocabulary, at temperature 0.6 and top_p 0.95, as its authors advise. Stages that differ in
nothing but how tokens are drawn are measured in turn, each in a process of its own; and draws from candidates are
compared with those from all logits.
"""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import get_args

import msgspec
import torch
import uvloop
from rich.table import Table

from actors.errors import LinkError
from actors.sockets.host import HostLink
from actors.sockets.link import Arrival
from actors.sockets.listener import HostListener, UnixAddress, connect
from actors.stage.setup import ENGINE, StageIdentity
from benchmarks.sampling.stage import VOCABULARY, LogitsOnMesh, StageCase, Way, model_like, run_stage
from benchmarks.support.machine import Machine
from benchmarks.support.options import benchmark_command
from benchmarks.support.peer import START_SECONDS, answer, running_peer
from benchmarks.support.report import Report, Target, publish, table_of
from benchmarks.support.spread import Spread, ratios
from stages.device import Device
from stages.sampling.sampler import Sampler
from stages.step import Admission, SamplingParams, Segment, StageFailure, Step, StepResult

WAYS: tuple[Way, ...] = get_args(Way)
USERS, SHORT_USERS = 128, 32
STEP_S = 0.04
"""About what a last stage of R1 is predicted to take, four stages of four rows each (docs/plan.md)."""

IN_FLIGHT = 3
TURNS, STEPS = 7, 40
SHORT_TURNS, SHORT_STEPS = 1, 4
DRAWS, SHORT_DRAWS = 100_000, 64
POSITIONS = 64
"""Positions at which tokens are drawn of the same logits, as each has random numbers of its own."""
COMPUTE_MS_MAX = 1.0
TIMES_NOTHING_MIN = 0.99
STEP_SECONDS = 60.0
EPOCH = 1


class SamplingRow(msgspec.Struct, frozen=True, kw_only=True):
    """A way of drawing: steps a second over those where nothing is drawn, and milliseconds of a step.

    `compute_ms` is the time of the compute thread beyond the step's own, `compute_cpu_ms` its processor time, and
    `sampling_cpu_ms` that of drawing, whichever thread does it.
    """

    way: str
    times_nothing: Spread
    compute_ms: Spread
    compute_cpu_ms: Spread
    sampling_cpu_ms: Spread


class Turn(msgspec.Struct, frozen=True):
    """Means of a step in one turn: seconds from one to the next, and what its threads took."""

    step_s: float
    compute_s: float
    compute_cpu_s: float
    sampling_cpu_s: float


class Agreement(msgspec.Struct, frozen=True):
    """So many `draws` from candidates, how many were `equal` to those from all logits, and how many fell back."""

    draws: int
    equal: int
    fallbacks: int


def params(seed: int) -> SamplingParams:
    """The sampling that DeepSeek-R1's authors advise."""
    return SamplingParams(temperature=0.6, top_p=0.95, top_k=0, seed=seed, choice=0)


def decode_step(step_id: int, users: int) -> Step:
    """A step of a token for each user, the first of which admits them all."""
    return Step(
        epoch=EPOCH,
        step_id=step_id,
        mode="decode",
        segments=[Segment(slot=slot, start=step_id, tokens=[1], new_blocks=[], sample=True) for slot in range(users)],
        admissions=[Admission(slot=slot, sampling=params(slot)) for slot in range(users)] if not step_id else [],
        ended=[],
    )


def agreement(draws: int, users: int) -> Agreement:
    """Draws from candidates and from all logits, which are others for each batch of users' positions."""
    equal = fallbacks = done = 0
    while done < draws:
        logits = model_like(users, seed=done)
        on_mesh = LogitsOnMesh(logits)
        sampler = Sampler(VOCABULARY)
        sampler.apply(sampler.prepare(decode_step(0, users)))
        for step_id in range(1, POSITIONS + 1):
            if done >= draws:
                break
            step = decode_step(step_id, users)
            found, whole = sampler.sample(step, on_mesh.candidates()), sampler.sample(step, on_mesh.whole())
            equal += sum(one == other for one, other in zip(found.tokens, whole.tokens, strict=True))
            fallbacks += found.fallbacks
            done += users
        sampler.close()
    return Agreement(done, equal, fallbacks)


class _Results:
    """The messages from a stage."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[StepResult | Exception] = asyncio.Queue()

    async def next(self) -> StepResult:
        """Waits for the next result. Raises LinkError if the stage failed, or left."""
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
            self._queue.put_nowait(LinkError(f"The stage failed: {message.cause}."))

    def lost(self, error: LinkError) -> None:
        self._queue.put_nowait(error)


class RunningStage:
    """A stage with the benchmark in place of the engine."""

    def __init__(self, case: StageCase, link: HostLink, results: _Results) -> None:
        self.case = case
        self._link = link
        self._results = results
        self._step_id = 0

    async def turn(self, steps: int) -> Turn:
        """Measures so many steps, IN_FLIGHT at once, after as many that fill the stage."""
        for _ in range(IN_FLIGHT):
            await self._send()
        times = []
        for place in range(steps + 2 * IN_FLIGHT):
            result = await self._results.next()
            times.append((asyncio.get_running_loop().time(), result.timings[0]))
            if place < steps + IN_FLIGHT:
                await self._send()
        (began, _), counted = times[IN_FLIGHT - 1], times[IN_FLIGHT : IN_FLIGHT + steps]
        timings = [timing for _, timing in counted]
        return Turn(
            step_s=(counted[-1][0] - began) / steps,
            compute_s=sum(each.ended_ns - each.began_ns for each in timings) / steps * 1e-9 - self.case.step_s,
            compute_cpu_s=sum(each.cpu_ns for each in timings) / steps * 1e-9,
            sampling_cpu_s=sum(each.sampling_cpu_ns for each in timings) / steps * 1e-9,
        )

    async def _send(self) -> None:
        step = decode_step(self._step_id, self.case.users)
        self._step_id += 1
        await asyncio.wait_for(self._link.send(step), STEP_SECONDS)


@contextlib.asynccontextmanager
async def running_stage(case: StageCase, directory: Path) -> AsyncIterator[RunningStage]:
    """Runs a stage in a process of its own, its sockets in two directories named after `directory`."""
    addresses = [UnixAddress(f"{directory}-{name}/link.sock") for name in ("up", "down")]
    identity = StageIdentity(
        index=0, stages=1, host="here", epoch=EPOCH, secret=b"sampling", dtype="bfloat16", bytes_per_token=2
    )
    results = _Results()
    up, down = identity.upstream_terms(), identity.downstream_terms()
    listener = HostListener.open(addresses[1], msgspec.structs.replace(down, name=ENGINE, peer=down.name), results)
    try:
        with running_peer(run_stage, None, case, identity, *addresses) as peer:
            await asyncio.to_thread(answer, peer)
            upstream = await asyncio.wait_for(listener.accepted(), START_SECONDS)
            link = await connect(addresses[0], msgspec.structs.replace(up, name=ENGINE, peer=up.name), results)
            try:
                yield RunningStage(case, link, results)
            finally:
                link.close()
                upstream.close()
    finally:
        listener.close()


async def measure(users: int, step_s: float, turns: int, steps: int) -> list[SamplingRow]:
    """Measures all ways in turn, in `turns` turns after one that is not counted."""
    taken: dict[Way, list[Turn]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="sampling-") as name:
        async with contextlib.AsyncExitStack() as stages:
            running = [
                await stages.enter_async_context(running_stage(StageCase(way, step_s, users), Path(name) / str(place)))
                for place, way in enumerate(WAYS)
            ]
            for turn in range(turns + 1):
                for stage in running:
                    measured = await stage.turn(steps)
                    # The first turn only warms up.
                    if turn:
                        taken[stage.case.way].append(measured)
    nothing = [turn.step_s for turn in taken["nothing drawn"]]
    return [_row(way, taken[way], nothing) for way in WAYS]


def _row(way: Way, turns: Sequence[Turn], nothing: Sequence[float]) -> SamplingRow:
    return SamplingRow(
        way=way,
        times_nothing=ratios(nothing, [turn.step_s for turn in turns]),
        compute_ms=Spread.of([turn.compute_s for turn in turns]).scaled(1e3),
        compute_cpu_ms=Spread.of([turn.compute_cpu_s for turn in turns]).scaled(1e3),
        sampling_cpu_ms=Spread.of([turn.sampling_cpu_s for turn in turns]).scaled(1e3),
    )


def _table(rows: Sequence[SamplingRow]) -> Table:
    table = table_of("tokens", "times nothing", "compute thread, ms", "its CPU, ms", "sampling CPU, ms")
    for row in rows:
        table.add_row(
            row.way,
            str(row.times_nothing),
            str(row.compute_ms),
            str(row.compute_cpu_ms),
            str(row.sampling_cpu_ms),
        )
    return table


@benchmark_command("sampling", ("embedded",))
def main(short: bool, device: Device, out: Path) -> None:
    """Measure what drawing tokens takes of a last stage, and compare draws from candidates with those from all."""
    machine = Machine.here()
    torch.set_num_threads(1)
    users = SHORT_USERS if short else USERS
    rows = uvloop.run(measure(users, STEP_S, SHORT_TURNS if short else TURNS, SHORT_STEPS if short else STEPS))
    agreed = agreement(SHORT_DRAWS if short else DRAWS, users)
    nothing, found = rows[0], rows[WAYS.index("beside, candidates")]
    beyond_ms = found.compute_ms.median - nothing.compute_ms.median
    what = f"candidates, {users} users"
    targets = [
        Target(
            name=f"ms of the compute thread a step, beyond those where nothing is drawn ({what})",
            bound=COMPUTE_MS_MAX,
            figure=beyond_ms,
        ),
        Target(
            name=f"steps a second, times those where nothing is drawn ({what})",
            bound=TIMES_NOTHING_MIN,
            figure=found.times_nothing.median,
            is_floor=True,
        ),
        Target(
            name=f"equal tokens of {agreed.draws} draws, of which {agreed.fallbacks} took all logits",
            bound=agreed.draws,
            figure=agreed.equal,
            is_floor=True,
        ),
    ]
    report = Report(benchmark="sampling", device=device, short=short, machine=machine, rows=rows, targets=targets)
    publish(report, _table(rows), out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.sampling")
