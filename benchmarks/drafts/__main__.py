"""`python -m benchmarks.drafts`: what drafts give, what they cost where they do not pay, and R1's beside `plan`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import uvloop
from rich.table import Table

from benchmarks.drafts.case import SHORT, DraftsRow, Load
from benchmarks.drafts.overhead import CASES, measure_overhead
from benchmarks.drafts.served import CASE, measure_served
from benchmarks.scaling import drafts as timed
from benchmarks.support.machine import Machine
from benchmarks.support.options import benchmark_command
from benchmarks.support.report import Report, Target, publish, table_of
from stages.device import Device

SERVED, OVERHEAD, TIMED = "served", "overhead", "timed"

USER, STAGES = 1, 4
TIMES_MIN = 1.5
"""What drafts are to give a single user of four stages."""

OVERHEAD_MIN = 0.97
DRAFTED_MAX = 0.1
"""The share of steps that drafts, which are never right, are tried in: 16 of 272 at most, and of a first turn a few."""

RANDOM = next(iter(CASES))


def targets_of(rows: Sequence[DraftsRow]) -> list[Target]:
    """The bounds that the figures have to keep."""
    targets = []
    for row in rows:
        if row.case == CASE and (row.stages, row.users) == (STAGES, USER):
            name = f"{row.users} user, {row.stages} stages, times without"
            targets.append(Target(name=name, bound=TIMES_MIN, figure=row.times.median, is_floor=True))
        elif row.case in CASES:
            name = f"{row.case}, times without"
            targets += [
                Target(name=name, bound=OVERHEAD_MIN, figure=row.times.median, is_floor=True),
                Target(name=f"{name}, overall", bound=OVERHEAD_MIN, figure=row.overall, is_floor=True),
            ]
            if row.case == RANDOM:
                targets.append(Target(name=f"{row.case}, drafted steps", bound=DRAFTED_MAX, figure=row.drafted))
    return targets


def _table(rows: Sequence[DraftsRow]) -> Table:
    table = table_of(
        "case", "stages", "users", "drafted", "tokens a draft", "tokens/s", "without", "times", "times overall"
    )
    for row in rows:
        table.add_row(
            row.case,
            str(row.stages),
            str(row.users),
            f"{row.drafted:.1%}",
            f"{row.tokens_per_draft:.2f}",
            str(row.with_drafts),
            str(row.without),
            str(row.times),
            f"{row.overall:.3f}",
        )
    return table


@benchmark_command("drafts", ("embedded",))
@click.option("--only", type=click.Choice((SERVED, OVERHEAD, TIMED)), multiple=True, help="A part; may be repeated.")
def main(short: bool, device: Device, out: Path, only: tuple[str, ...]) -> None:
    """Measure tokens a second with drafts over those without, and R1's drafts on the timed device over `plan`'s.

    Of the sample model: answers of servers, and one stage with as many users as drafts do not pay for. Of R1: what is
    predicted for stages of a Galaxy row, whose times the timed device takes; its figures are a file of their own.
    """
    machine = Machine.here()
    parts = only or (SERVED, OVERHEAD, TIMED)
    load = SHORT if short else Load()
    rows = uvloop.run(measure_served(load)) if SERVED in parts else []
    rows += measure_overhead(load) if OVERHEAD in parts else []
    if rows:
        targets = targets_of(rows)
        report = Report(benchmark="drafts", device=device, short=short, machine=machine, rows=rows, targets=targets)
        publish(report, _table(rows), out)
    if TIMED in parts:
        _publish_timed(short, machine, out)


def _publish_timed(short: bool, machine: Machine, out: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="galaxyline-bench-") as cache_dir:
        rows = list(timed.measure_all(Path(cache_dir), short=short))
    targets = timed.targets(rows)
    report = Report(benchmark="drafts", device="timed", short=short, machine=machine, rows=rows, targets=targets)
    publish(report, timed.table(rows), out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.drafts")
