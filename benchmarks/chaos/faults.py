"""The faults of the chaos benchmark: how stages are hurt, and how long until tokens come again."""

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import httpx
import msgspec

from benchmarks.chaos.damage import damage
from benchmarks.chaos.load import Load
from benchmarks.chaos.server import ChaosServer, PipelineState
from benchmarks.chaos.stage import give_order, is_obeyed, withdraw
from benchmarks.support.server_process import ServerError

Kind = Literal[
    "kill", "stop", "hiccup", "cut", "raise", "hang", "damage", "kill two", "kill in recovery", "stop in recovery"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
BAG: tuple[Kind, ...] = (*KINDS, "kill", "cut", "raise")
"""The kinds that faults are drawn from; faults of a single stage are more frequent.

Before a "damage" kills a stage, all that is kept of the KV cache beside the devices is damaged."""

ORDER_SECONDS = 15.0
"""The most seconds until a stage gets a step, before which it reads its order."""
BACK_SECONDS = 90.0
TOKEN_SECONDS = 15.0
HICCUP_SECONDS = (0.1, 1.5)
"""The range of seconds that a stage is stopped for; one that is silent for 3 s counts as lost."""
CALM_SECONDS = 2.0
"""Seconds after a hiccup in which no recovery may happen."""
NOTICE_SECONDS = 15.0
IN_RECOVERY_SECONDS = (0.0, 0.5)
"""The range of seconds from the detection of the first fault to the second one: a spare needs some 0.3 s to become a
stage, a new process 3 s."""
POLL_SECONDS = 0.02


class FaultRow(msgspec.Struct, frozen=True, kw_only=True):
    """One fault: its time in seconds after the load began, and the seconds until the first token of the next epoch."""

    kind: Kind
    stages: list[int]
    at_s: float
    recovery_s: float | None


class Faults:
    """Draws faults and their victims, and causes them; every kind of BAG comes before any is repeated."""

    def __init__(self, server: ChaosServer, load: Load, http: httpx.AsyncClient, seed: int) -> None:
        self.rows: list[FaultRow] = []
        self._server = server
        self._load = load
        self._http = http
        self._draw = random.Random(seed)
        self._kinds = self._drawn_kinds()
        self._began_at = asyncio.get_running_loop().time()

    async def strike(self) -> None:
        """Causes one fault of any kind and waits for the first token after it.

        Raises ServerError if the pipeline does not come back, or if a hiccup causes a recovery.
        """
        kind = next(self._kinds)
        before = await self._server.state(self._http)
        victims = self._draw.sample(range(len(before.pids)), 2)
        fault_at = asyncio.get_running_loop().time()
        if kind == "hiccup":
            await self._hiccup(before, victims[0])
            self._note(kind, victims[:1], fault_at, None)
            return
        is_double = await self._do(kind, before, victims)
        await self._server.back(self._http, before.epoch, BACK_SECONDS)
        token_at = await self._load.next_token(TOKEN_SECONDS)
        self._note(kind, victims if is_double else victims[:1], fault_at, token_at - fault_at)

    def _note(self, kind: Kind, stages: list[int], fault_at: float, recovery_s: float | None) -> None:
        self.rows.append(FaultRow(kind=kind, stages=stages, at_s=fault_at - self._began_at, recovery_s=recovery_s))

    def _drawn_kinds(self) -> Iterator[Kind]:
        while True:
            yield from self._draw.sample(BAG, len(BAG))

    async def _do(self, kind: Kind, before: PipelineState, victims: list[int]) -> bool:
        """Causes a fault; returns whether a second stage was hurt."""
        pid, other = (before.pids[victim] for victim in victims)
        if kind == "damage":
            damage(self._server, self._draw)
        if kind in {"cut", "raise", "hang"}:
            await self._order(victims[0], kind)
            return False
        _send(pid, signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
        if kind == "kill two":
            _send(other, signal.SIGKILL)
        elif kind == "kill in recovery":
            await self._in_recovery(before, pid, signal.SIGKILL)
        elif kind == "stop in recovery":
            await self._in_recovery(before, pid, signal.SIGSTOP)
        return kind not in {"kill", "stop", "damage"}

    async def _order(self, stage: int, order: str) -> None:
        file = give_order(self._server.directory, stage, order)
        await _until_gone(file, f"stage {stage} to take the order '{order}'", ORDER_SECONDS)

    async def _hiccup(self, before: PipelineState, victim: int) -> None:
        pid = before.pids[victim]
        _send(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(self._draw.uniform(*HICCUP_SECONDS))
        finally:
            _send(pid, signal.SIGCONT)
        await self._load.next_token(TOKEN_SECONDS)
        await asyncio.sleep(CALM_SECONDS)
        after = await self._server.state(self._http)
        if (after.epoch, after.restarts) != (before.epoch, before.restarts):
            raise ServerError(f"A hiccup of stage {victim} cost a recovery. The server's log is {self._server.log}.")

    async def _in_recovery(self, before: PipelineState, dead: int, number: signal.Signals) -> None:
        """Sends a signal to another stage's process, old or just started, while the pipeline recovers."""
        deadline = asyncio.get_running_loop().time() + NOTICE_SECONDS
        while (await self._http.get(f"{self._server.url}/health")).status_code == httpx.codes.OK:
            if asyncio.get_running_loop().time() > deadline:
                raise ServerError(f"A killed stage was not detected. The server's log is {self._server.log}.")
            await asyncio.sleep(POLL_SECONDS)
        await asyncio.sleep(self._draw.uniform(*IN_RECOVERY_SECONDS))
        alive = sorted({*self._server.stage_pids()} - {dead})
        if alive:
            _send(self._draw.choice(alive), number)


def _send(pid: int, number: signal.Signals) -> None:
    if pid <= 0:
        raise ServerError("A stage that should be there has no process.")
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


async def _until_gone(file: Path, what: str, seconds: float) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not is_obeyed(file):
        if asyncio.get_running_loop().time() > deadline:
            withdraw(file)
            raise ServerError(f"Waited {seconds:g} s in vain for {what}.")
        await asyncio.sleep(POLL_SECONDS)
