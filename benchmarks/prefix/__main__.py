"""`python -m benchmarks.prefix`: what the prefix cache and its tiers save, beside the same servers without them."""

from collections.abc import Sequence
from pathlib import Path

import click
import uvloop
from rich.table import Table

from benchmarks.prefix.overhead import CASE, measure_overhead
from benchmarks.prefix.sharing import BLOCK, SHORT, WITHOUT, Load, PrefixRow, measure_sharing, served
from benchmarks.prefix.tiers import measure_recovery, measure_tiers
from benchmarks.support.machine import Machine
from benchmarks.support.options import benchmark_command
from benchmarks.support.report import Report, Target, publish, table_of
from stages.device import Device

HIT_RATE_LACK_MAX = 0.02
OVERHEAD_MIN = 0.98
TIER_MAX = 1 / 3
PAUSE_MAX = 1 / 3


async def measure(load: Load, beside: str | None) -> list[PrefixRow]:
    """Measures all cases, one after the other."""
    async with served(*WITHOUT) as without:
        rows = await measure_sharing(without, load, beside)
        rows += await measure_tiers(without, load)
    return [*rows, await measure_recovery(load), measure_overhead(load)]


def targets_of(rows: Sequence[PrefixRow]) -> list[Target]:
    """The bounds that the figures have to keep."""
    targets = [
        Target(
            name=f"{row.case}: hit rate less than ideal by", bound=HIT_RATE_LACK_MAX, figure=row.ideal - row.hit_rate
        )
        for row in rows
        if row.ideal and not row.case.endswith("beside")
    ]
    for row in rows:
        if row.case == CASE:
            targets.append(
                Target(name=f"{row.case}, times without", bound=OVERHEAD_MIN, figure=row.times.median, is_floor=True)
            )
        elif row.case.startswith("twice"):
            targets.append(Target(name=f"{row.case}, times computed", bound=TIER_MAX, figure=row.times.median))
        elif row.case.startswith("a stage is lost"):
            targets.append(Target(name="pause, times that without tiers", bound=PAUSE_MAX, figure=row.times.median))
            targets.append(Target(name="tokens of a user computed again", bound=BLOCK, figure=row.recomputed))
    return targets


def _table(rows: Sequence[PrefixRow]) -> Table:
    table = table_of("case", "unit", "cached", "computed", "times", "hits", "ideal")
    for row in rows:
        rates = [f"{rate:.1%}" if row.ideal else "" for rate in (row.hit_rate, row.ideal)]
        table.add_row(row.case, row.unit, str(row.cached), str(row.computed), str(row.times), *rates)
    return table


@benchmark_command("prefix")
@click.option("--beside", metavar="URL", help="A running server to measure too, such as vLLM's with its prefix cache.")
def main(short: bool, device: Device, out: Path, beside: str | None) -> None:
    """Measure what is saved by blocks that are found, on the embedded device, whichever is named."""
    machine = Machine.here()
    rows = uvloop.run(measure(SHORT if short else Load(), beside))
    report = Report(
        benchmark="prefix", device=device, short=short, machine=machine, rows=rows, targets=targets_of(rows)
    )
    publish(report, _table(rows), out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.prefix")
