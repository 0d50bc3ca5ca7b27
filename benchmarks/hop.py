"""`python -m benchmarks.hop`: hidden states from one stage to the next, beside a blocking unix socket.

Three things carry the same bytes in turn: blocking calls on a unix socket (the floor), the pipeline's links from loop
to loop ("bare"), and two stages, from the end of one's computing to the beginning of the other's ("whole").
"""

import itertools
import os
import statistics
import tempfile
from pathlib import Path

import msgspec
import uvloop
from rich.table import Table

from actors.cores import apply_share
from actors.options import Device
from benchmarks.bare_link import BareLink, bare_link
from benchmarks.hop_steps import BYTES_PER_TOKEN
from benchmarks.machine import Machine
from benchmarks.options import benchmark_command
from benchmarks.peer import two_shares
from benchmarks.ping_pong import PingPong, ping_pong
from benchmarks.report import Report, Target, publish, table_of
from benchmarks.spread import Spread, ratios
from benchmarks.stage_pair import StagePair, stage_pair
from stages.options import DEVICE_VARIABLE

TURNS = 15
SHORT_TURNS = 3
BARE_RATIO_MAX = 1.5
WHOLE_RATIO_MAX = 3.0


class Size(msgspec.Struct, frozen=True):
    """Hidden states of `tokens` tokens, sent `count` times in a turn."""

    label: str
    tokens: int
    count: int


SIZES = [Size("14 KB", 1, 200), Size("448 KB", 32, 60), Size("1.8 MB", 128, 30), Size("58 MB", 4096, 3)]
SHORT_SIZES = [Size("14 KB", 1, 20), Size("448 KB", 32, 5)]


class HopRow(msgspec.Struct, frozen=True, kw_only=True):
    """One size: microseconds one way, and how many times as long as the floor's."""

    size: str
    bytes: int
    floor_us: Spread
    bare_us: Spread
    whole_us: Spread
    bare_ratio: Spread
    whole_ratio: Spread


class Carriers(msgspec.Struct, frozen=True):
    """What carries the bytes."""

    floor: PingPong
    bare: BareLink
    whole: StagePair

    async def turn(self, size: Size) -> tuple[float, float, float]:
        """Seconds one way of each: the median of `size.count` times."""
        floor = self.floor.one_way_seconds(size.tokens * BYTES_PER_TOKEN, size.count)
        bare = await self.bare.one_way_seconds(size.tokens, size.count)
        whole = await self.whole.hop_seconds(size.tokens, size.count)
        return statistics.median(floor), statistics.median(bare), statistics.median(whole)


async def measure(sizes: list[Size], turns: int) -> list[HopRow]:
    """All sizes, each in so many turns."""
    shares = two_shares()
    apply_share(shares[0], os.environ)
    times: dict[str, list[tuple[float, float, float]]] = {size.label: [] for size in sizes}
    with tempfile.TemporaryDirectory(prefix="hop-") as name:
        directory = Path(name)
        with ping_pong(directory, shares[1]) as floor:
            async with bare_link(directory, shares[1]) as bare, stage_pair(directory, shares) as whole:
                carriers = Carriers(floor, bare, whole)
                for _, size in itertools.product(range(turns), sizes):
                    times[size.label].append(await carriers.turn(size))
    return [_row(size, times[size.label]) for size in sizes]


def _row(size: Size, times: list[tuple[float, float, float]]) -> HopRow:
    floor, bare, whole = zip(*times, strict=True)
    return HopRow(
        size=size.label,
        bytes=size.tokens * BYTES_PER_TOKEN,
        floor_us=Spread.of(floor).scaled(1e6),
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
    table = table_of("size", "ping-pong, us", "bare hop, us", "whole hop, us", "bare / ping-pong", "whole / ping-pong")
    for row in rows:
        figures = (row.floor_us, row.bare_us, row.whole_us, row.bare_ratio, row.whole_ratio)
        table.add_row(row.size, *map(str, figures))
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
