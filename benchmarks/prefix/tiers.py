"""Blocks beside the device: a working set of twice its size, and the pause after the loss of a stage."""

import asyncio
import os
import signal
import tempfile
import time

import psutil

from benchmarks.prefix.asking import Asker, made_up
from benchmarks.prefix.sharing import BLOCK, STAGES, Load, PrefixRow, serve_command, served
from benchmarks.support.ports import free_port
from benchmarks.support.server_process import running_server
from benchmarks.support.spread import Spread, ratios
from weights.sizes import ceil_div

PROMPT_BLOCKS = 47
PROMPT_TOKENS = PROMPT_BLOCKS * BLOCK - 4
"""The tokens of a prompt of the working set, some 1500."""

ANSWER_TOKENS = 300
"""More than come while all prompts are computed again."""

SETTLE_SECONDS = 6.0
"""The engine asks stages every five seconds what they keep, and they write to the disk behind their steps."""


async def measure_tiers(without: Asker, load: Load) -> list[PrefixRow]:
    """Asks for a working set again and again that is kept on the host or on the disk, and by computing it."""
    blocks = ("--num-blocks", str(load.device_blocks), "--max-num-seqs", "6")
    rows = []
    with tempfile.TemporaryDirectory(prefix="galaxyline-bench-") as directory:
        options = {"host": ("--kv-host-memory", "1G"), "disk": ("--kv-host-memory", "0", "--kv-dir", directory)}
        for name in load.tiers:
            async with served(*blocks, *options[name]) as asker:
                rows.append(await _working_set(name, asker, without, load))
    return rows


async def _working_set(name: str, asker: Asker, without: Asker, load: Load) -> PrefixRow:
    count = ceil_div(2 * load.device_blocks, PROMPT_BLOCKS)
    prompts = [made_up(f"{name} {number}", PROMPT_TOKENS) for number in range(count)]
    for server in (asker, without):
        await _seconds(server, prompts)
    await asyncio.sleep(SETTLE_SECONDS)
    before = await asker.counters()
    cached, computed = [], []
    for _ in range(load.rounds):
        cached.append(await _seconds(asker, prompts))
        computed.append(await _seconds(without, prompts))
    counted = (await asker.counters()).since(before)
    return PrefixRow(
        case=f"twice the device's blocks, from {name}",
        unit="ms to the first token",
        cached=Spread.of(cached).scaled(1e3 / count),
        computed=Spread.of(computed).scaled(1e3 / count),
        times=ratios(cached, computed),
        hit_rate=counted.hit_rate,
        ideal=(PROMPT_BLOCKS - 1) * BLOCK / PROMPT_TOKENS,
    )


async def _seconds(asker: Asker, prompts: list[list[int]]) -> float:
    """Asks for one token after each prompt, one after the other; returns the seconds of all."""
    return sum([(await asker.ask(prompt, 1)).first_s for prompt in prompts])


async def measure_recovery(load: Load) -> PrefixRow:
    """Kills a stage under users in the middle of their answers, with copies of the cache on the host and without."""
    cached, computed, again = [], [], 0.0
    for turn in range(load.rounds):
        pause, recomputed = await _pause(load, f"kept {turn}")
        cached.append(pause)
        again = max(again, recomputed)
        pause, _ = await _pause(load, f"lost {turn}", "--kv-host-memory", "0")
        computed.append(pause)
    return PrefixRow(
        case=f"a stage is lost under {load.users} users at {load.system_tokens} tokens",
        unit="s until all go on",
        cached=Spread.of(cached),
        computed=Spread.of(computed),
        times=ratios(cached, computed),
        recomputed=again,
    )


async def _pause(load: Load, seed: str, *options: str) -> tuple[float, float]:
    """Returns the seconds from the kill until every user has another token, and the tokens of each computed again."""
    port = free_port()
    command = [option for option in serve_command(port, *options) if option != "--no-spare"]
    with running_server(command, port, STAGES) as server:
        async with Asker(server.url) as asker:
            users = [_User() for _ in range(load.users)]
            asking = [
                asyncio.create_task(
                    asker.ask(made_up(f"{seed} {number}", load.system_tokens), ANSWER_TOKENS, user.note_token)
                )
                for number, user in enumerate(users)
            ]
            await asyncio.gather(*(user.has_begun.wait() for user in users))
            victim: psutil.Process = server.stages[-1]
            os.kill(victim.pid, signal.SIGKILL)
            killed = time.monotonic()
            for user in users:
                user.begin_anew(killed)
            await asyncio.gather(*(user.goes_on.wait() for user in users))
            pause = max(user.gap_end for user in users) - killed
            await asyncio.gather(*asking)
            return pause, (await asker.counters()).recomputed / load.users


MOMENT_S = 0.5
"""Tokens that come so soon after the kill were made before it."""


class _User:
    """When a user's tokens come."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.gap_end = 0.0
        self._killed: float | None = None

    def note_token(self) -> None:
        self.has_begun.set()
        now = time.monotonic()
        if self._killed is not None and now - self._killed > MOMENT_S and not self.goes_on.is_set():
            self.gap_end = now
            self.goes_on.set()

    def begin_anew(self, killed: float) -> None:
        self._killed = killed
