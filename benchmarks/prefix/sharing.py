"""Prompts that begin alike: a conversation, and users behind one system prompt; and what it costs where none do."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from benchmarks.prefix.asking import Asker, Counters, made_up
from benchmarks.support.ports import free_port
from benchmarks.support.server_process import running_server
from benchmarks.support.spread import Spread, ratios

STAGES = 2
USERS = 32
SYSTEM_TOKENS = 1500
BLOCK = 32


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """How much is measured: turns of a conversation, users, tokens of the system prompt, rounds of all of it.

    `device_blocks` are those of a device whose working set is twice as large, kept in each of `tiers`.
    """

    turns: int = 10
    users: int = USERS
    system_tokens: int = SYSTEM_TOKENS
    rounds: int = 3
    device_blocks: int = 256
    tiers: tuple[str, ...] = ("host", "disk")


SHORT = Load(turns=3, users=4, system_tokens=128, rounds=1, device_blocks=64, tiers=("host",))

WITHOUT = ("--no-enable-prefix-caching", "--kv-host-memory", "0")
"""Options of a server that computes everything."""


class PrefixRow(msgspec.Struct, frozen=True, kw_only=True):
    """One case with what is cached and without: the figure in `unit`, and their ratio.

    `hit_rate` is the share of prompt tokens that were found, `ideal` that of a cache which loses nothing; both are 0
    where that is not the point. `recomputed` are tokens that were computed a second time, for each user and loss.
    """

    case: str
    unit: str
    cached: Spread
    computed: Spread
    times: Spread
    hit_rate: float = 0.0
    ideal: float = 0.0
    recomputed: float = 0.0


def serve_command(port: int, *options: str) -> list[str]:
    """The command of a server of the sample model, with further options."""
    stages = ["--stages", str(STAGES), "--no-spare"]
    return [sys.executable, "-m", "api.cli", "serve", "--port", str(port), *stages, *options]


@asynccontextmanager
async def served(*options: str) -> AsyncIterator[Asker]:
    """A server of the sample model, and its client."""
    port = free_port()
    with running_server(serve_command(port, *options), port, STAGES) as server:
        async with Asker(server.url) as asker:
            yield asker


class IdealCache:
    """A cache that keeps all full blocks of all prompts and answers, and gives all but a prompt's last token."""

    def __init__(self) -> None:
        self._blocks: set[tuple[int, ...]] = set()
        self.queries = 0
        self.hits = 0

    def look_up(self, prompt: list[int]) -> None:
        """Counts what it has of a prompt."""
        self.queries += len(prompt)
        for end in range(BLOCK, len(prompt), BLOCK):
            if tuple(prompt[:end]) not in self._blocks:
                break
            self.hits += BLOCK

    def fill(self, tokens: list[int]) -> None:
        """Takes in what has been computed: of an answer all but the last token."""
        self._blocks.update(tuple(tokens[:end]) for end in range(BLOCK, len(tokens), BLOCK))

    @property
    def hit_rate(self) -> float:
        """The share of the tokens that were looked up which it has."""
        return self.hits / self.queries


async def conversation(asker: Asker, load: Load, seed: str, ideal: IdealCache | None = None) -> float:
    """Goes through the turns of a conversation; returns the mean seconds to a turn's first token."""
    history = made_up(f"{seed} system", 200)
    firsts: list[float] = []
    for turn in range(load.turns):
        history += made_up(f"{seed} turn {turn}", 40)
        answer = await asker.ask(history, 40)
        firsts.append(answer.first_s)
        if ideal is not None:
            ideal.look_up(history)
            ideal.fill([*history, *answer.tokens])
        history += answer.tokens
    return sum(firsts) / len(firsts)


async def crowd(asker: Asker, load: Load, seed: str, ideal: IdealCache | None = None) -> float:
    """Sends all users' requests at once; returns the mean seconds to their first tokens."""
    system = made_up(f"{seed} system", load.system_tokens)
    prompts = [[*system, *made_up(f"{seed} user {user}", 30)] for user in range(load.users)]
    if ideal is not None:
        for prompt in prompts:
            ideal.look_up(prompt)
            ideal.fill(prompt)
    answers = await asyncio.gather(*(asker.ask(prompt, 8) for prompt in prompts))
    return sum(answer.first_s for answer in answers) / len(answers)


async def strangers(asker: Asker, load: Load, seed: str) -> float:
    """Sends requests that have nothing in common; returns their tokens a second, prompts and answers."""
    prompts = [made_up(f"{seed} {user}", load.system_tokens // 3) for user in range(load.users)]
    began = time.monotonic()
    await asyncio.gather(*(asker.ask(prompt, 48) for prompt in prompts))
    return sum(len(prompt) + 48 for prompt in prompts) / (time.monotonic() - began)


async def measure_sharing(without: Asker, load: Load, beside: str | None) -> list[PrefixRow]:
    """Measures all cases in turn with a server that computes everything, and one that is running, if any."""
    async with served() as asker:
        rows = [
            await _shared("conversation of turns", conversation, asker, without, load),
            await _shared(f"{load.users} users behind one system prompt", crowd, asker, without, load),
            await _overhead(asker, without, load),
        ]
        if beside is not None:
            async with Asker(beside) as other:
                rows.append(await _shared("conversation, beside", conversation, other, without, load))
                rows.append(await _shared("users behind one system prompt, beside", crowd, other, without, load))
    return rows


Case = Callable[[Asker, Load, str, IdealCache | None], Coroutine[Any, Any, float]]


async def _shared(name: str, case: Case, asker: Asker, without: Asker, load: Load) -> PrefixRow:
    ideal = IdealCache()
    before = await asker.counters()
    cached, computed = [], []
    for turn in range(load.rounds):
        cached.append(await case(asker, load, f"{name} {turn}", ideal))
        computed.append(await case(without, load, f"{name} {turn}", None))
    counted: Counters = (await asker.counters()).since(before)
    return PrefixRow(
        case=name,
        unit="ms to the first token",
        cached=Spread.of(cached).scaled(1e3),
        computed=Spread.of(computed).scaled(1e3),
        times=ratios(cached, computed),
        hit_rate=counted.hit_rate,
        ideal=ideal.hit_rate,
    )


async def _overhead(asker: Asker, without: Asker, load: Load) -> PrefixRow:
    await strangers(asker, load, "first")
    await strangers(without, load, "first")
    cached, computed = [], []
    for turn in range(2 * load.rounds):
        cached.append(await strangers(asker, load, str(turn)))
        computed.append(await strangers(without, load, str(turn)))
    return PrefixRow(
        case="nothing in common, on two servers",
        unit="tokens/s",
        cached=Spread.of(cached),
        computed=Spread.of(computed),
        times=ratios(cached, computed),
    )
