"""`python -m benchmarks.hop`: the time of hidden states from one stage to the next, beside a blocking unix socket.

Four carriers send the same bytes in turn: blocking calls on a unix socket (the floor), bare event loops, the
pipeline's links from loop to loop ("bare"), and two stages, from the end of one's computing to the beginning of the
other's ("whole"). Each does all that the one before it does and more, so the differences show where time goes. What a
link computes for a frame ("framing") is measured too, in a loop that keeps caches warm.
"""

import itertools
import os
import statistics
import tempfile
from pathlib import Path
from typing import NamedTuple

import msgspec
import uvloop
from rich.table import Table

from actors.stage.process import apply_share
from benchmarks.hop.bare_link import BareLink, bare_link
from benchmarks.hop.event_loop import EventLoop, event_loop
from benchmarks.hop.ping_pong import PingPong, ping_pong
from benchmarks.hop.stage_pair import StagePair, stage_pair
from benchmarks.hop.steps import BYTES_PER_TOKEN, Framing
from benchmarks.support.machine import Machine
from benchmarks.support.options import benchmark_command
from benchmarks.support.peer import two_shares
from benchmarks.support.report import Report, Target, publish, table_of
from benchmarks.support.spread import Spread, ratios
from stages.device import DEVICE_VARIABLE, Device

TURNS = 15
SHORT_TURNS = 3
BARE_RATIO_MAX = 1.5
WHOLE_RATIO_MAX = 3.0


class Size(msgspec.Struct, frozen=True):
    """The hidden states of `tokens` tokens, sent `count` times in a turn."""

    label: str
    tokens: int
    count: int


SIZES = [Size("14 KB", 1, 200), Size("448 KB", 32, 60), Size("1.8 MB", 128, 30), Size("58 MB", 4096, 3)]
SHORT_SIZES = [Size("14 KB", 1, 20), Size("448 KB", 32, 5)]


class HopRow(msgspec.Struct, frozen=True, kw_only=True):
    """The times of one size: microseconds one way, and ratios to the floor."""

    size: str
    bytes: int
    floor_us: Spread
    event_loop_us: Spread
    framing_us: Spread
    bare_us: Spread
    whole_us: Spread
    bare_ratio: Spread
    whole_ratio: Spread


class Turn(NamedTuple):
    """Seconds one way; for framing, seconds per frame."""

    floor: float
    event_loop: float
    framing: float
    bare: float
    whole: float


class Carriers(msgspec.Struct, frozen=True):
    """The carriers of the bytes."""

    floor: PingPong
    event_loop: EventLoop
    framing: Framing
    bare: BareLink
    whole: StagePair

    async def turn(self, size: Size) -> Turn:
        """Measures each carrier once: the median of `size.count` times."""
        floor = self.floor.one_way_seconds(size.tokens * BYTES_PER_TOKEN, size.count)
        event_loop = await self.event_loop.one_way_seconds(size.tokens * BYTES_PER_TOKEN, size.count)
        framing = self.framing.seconds(size.tokens, size.count)
        bare = await self.bare.one_way_seconds(size.tokens, size.count)
        whole = await self.whole.hop_seconds(size.tokens, size.count)
        return Turn(*map(statistics.median, (floor, event_loop, framing, bare, whole)))


async def measure(sizes: list[Size], turns: int) -> list[HopRow]:
    """Measures all sizes in `turns` turns."""
    shares = two_shares()
    apply_share(shares[0], os.environ)
    times: dict[str, list[Turn]] = {size.label: [] for size in sizes}
    with tempfile.TemporaryDirectory(prefix="hop-") as name:
        directory = Path(name)
        with ping_pong(directory, shares[1]) as floor:
            async with (
                event_loop(directory, shares[1]) as looped,
                bare_link(directory, shares[1]) as bare,
                stage_pair(directory, shares) as whole,
            ):
                carriers = Carriers(floor, looped, Framing(), bare, whole)
                for _, size in itertools.product(range(turns), sizes):
                    times[size.label].append(await carriers.turn(size))
    return [_row(size, times[size.label]) for size in sizes]


def _row(size: Size, turns: list[Turn]) -> HopRow:
    floor, looped, framing, bare, whole = zip(*turns, strict=True)
    return HopRow(
        size=size.label,
        bytes=size.tokens * BYTES_PER_TOKEN,
        floor_us=Spread.of(floor).scaled(1e6),
        event_loop_us=Spread.of(looped).scaled(1e6),
        framing_us=Spread.of(framing).scaled(1e6),
        bare_us=Spread.of(bare).scaled(1e6),
        whole_us=Spread.of(whole).scaled(1e6),
        bare_ratio=ratios(bare, floor),
        whole_ratio=ratios(whole, floor),
    )


def _targets(rows: list[HopRow]) -> list[Target]:
    smallest = rows[0]
    return [
        Target(
            name=f"bare hop of {smallest.size} / ping-pong", bound=BARE_RATIO_MAX, figure=smallest.bare_ratio.median
        ),
        Target(
            name=f"whole hop of {smallest.size} / ping-pong", bound=WHOLE_RATIO_MAX, figure=smallest.whole_ratio.median
        ),
    ]


def _table(rows: list[HopRow]) -> Table:
    times = ("ping-pong", "event loop", "framing", "bare hop", "whole hop")
    table = table_of("size, us", *times, "bare / ping-pong", "whole / ping-pong")
    for row in rows:
        medians = [
            f"{spread.median:.3g}"
            for spread in (row.floor_us, row.event_loop_us, row.framing_us, row.bare_us, row.whole_us)
        ]
        table.add_row(row.size, *medians, str(row.bare_ratio), str(row.whole_ratio))
    return table


@benchmark_command("hop")
def main(short: bool, device: Device, out: Path) -> None:
    """Time hidden states from one stage to the next, beside a blocking unix socket of the same run.

    Medians of turns, and the quartiles between which half of the turns lie.
    """
    os.environ[DEVICE_VARIABLE] = device
    machine = Machine.here()
    sizes, turns = (SHORT_SIZES, SHORT_TURNS) if short else (SIZES, TURNS)
    rows = uvloop.run(measure(sizes, turns))
    report = Report(benchmark="hop", device=device, short=short, machine=machine, rows=rows, targets=_targets(rows))
    publish(report, _table(rows), out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.hop")
