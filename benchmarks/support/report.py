"""Reports of benchmarks: tables for people, JSON for programs."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.support.machine import Machine
from stages.device import Device

Row = TypeVar("Row", bound=msgspec.Struct)

WIDTH = 120


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A bound that a figure has to keep: at most `bound`, or at least if `is_floor`."""

    name: str
    bound: float
    figure: float
    is_floor: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the figure keeps the bound."""
        return self.figure >= self.bound if self.is_floor else self.figure <= self.bound


class Report(msgspec.Struct, Generic[Row], frozen=True, kw_only=True):
    """One run of a benchmark. `made_at` is in seconds since 1970; a `short` run only shows that the benchmark works."""

    benchmark: str
    device: Device
    short: bool
    machine: Machine
    rows: list[Row]
    targets: list[Target]
    made_at: float = msgspec.field(default_factory=time.time)


def publish(report: Report[Row], table: Table, directory: Path) -> None:
    """Prints the table and the targets, and writes `directory`/BENCHMARK.DEVICE.json."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{report.benchmark}.{report.device}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    console = Console(width=None if Console().is_terminal else WIDTH)
    table.title = f"{report.benchmark} on {report.device}{' (short form)' if report.short else ''}"
    table.caption = str(report.machine)
    console.print(table)
    if report.targets:
        console.print(_targets(report.targets))
    console.print(f"{path}\n", soft_wrap=True)


def table_of(*columns: str) -> Table:
    """A table whose first column names the rows and whose others hold figures."""
    table = Table()
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left")
    return table


def _targets(targets: Sequence[Target]) -> Table:
    table = table_of("target", "bound", "figure", "")
    for target in targets:
        bound = f"{'>=' if target.is_floor else '<='} {target.bound:g}"
        table.add_row(target.name, bound, f"{target.figure:.3g}", "met" if target.is_met else "missed")
    return table
