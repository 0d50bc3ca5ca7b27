"""`python -m benchmarks.loading`: the time to load a stage's weights from an FP8 checkpoint, and from the weight cache.

The first start of a model converts every part and fills the cache; later ones map the files of the cache and check
every byte. The two are measured in turn, each in a process of its own, and each turn has a new cache.
"""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.table import Table

from actors.stage.process import apply_share, share_cores
from benchmarks.checkpoint import write_checkpoint
from benchmarks.loading.stage_weights import Load, load_once
from benchmarks.support.machine import Machine
from benchmarks.support.options import benchmark_command
from benchmarks.support.report import Report, Target, publish, table_of
from benchmarks.support.spread import Spread, ratios
from stages.device import DEVICE_VARIABLE, Device
from stages.options import CacheOptions, StageOptions

TURNS = 3
SHORT_TURNS = 1
RATIO_MIN = 5.0
"""The least ratio of converting to loading from the cache; below, the cache would not be worth its disk space."""

KV_CACHE = CacheOptions(slots=1, pools=1, blocks=2, block_size=32, max_model_len=64)


class LoadingRow(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one checkpoint of `bytes` bytes.

    Seconds are from opening it until a stage has all weights, and megabytes (10^6 bytes) are those that came from the
    disk meanwhile, not from the page cache. `ratio` is the ratio of the seconds, turn by turn.
    """

    checkpoint: str
    bytes: int
    converted_s: Spread
    cached_s: Spread
    ratio: Spread
    converted_disk_mb: Spread
    cached_disk_mb: Spread


class Turn(NamedTuple):
    """The first start with an empty cache, and the next one."""

    converted: Load
    cached: Load


def measure(model: Path, turns: int) -> list[Turn]:
    """Measures `turns` turns; caches are created beside the model, and removed."""
    return [_turn(model) for _ in range(turns)]


def _turn(model: Path) -> Turn:
    with tempfile.TemporaryDirectory(prefix="loading-", dir=model.parent) as cache_dir:
        options = StageOptions(model_path=str(model), cache_dir=cache_dir, dtype="bfloat16", seed=0, cache=KV_CACHE)
        return Turn(load_once(options), load_once(options))


def row_of(model: Path, turns: list[Turn]) -> LoadingRow:
    """The figures of all turns of one checkpoint."""
    converted, cached = zip(*turns, strict=True)
    converted_s, cached_s = [load.seconds for load in converted], [load.seconds for load in cached]
    return LoadingRow(
        checkpoint=model.name,
        bytes=sum(file.stat().st_size for file in model.glob("*.safetensors")),
        converted_s=Spread.of(converted_s),
        cached_s=Spread.of(cached_s),
        ratio=ratios(converted_s, cached_s),
        converted_disk_mb=Spread.of([load.disk_bytes for load in converted]).scaled(1e-6),
        cached_disk_mb=Spread.of([load.disk_bytes for load in cached]).scaled(1e-6),
    )


def _targets(row: LoadingRow) -> list[Target]:
    return [Target(name="converting / loading from the cache", bound=RATIO_MIN, figure=row.ratio.median, is_floor=True)]


def _table(row: LoadingRow) -> Table:
    table = table_of("weights", "seconds", "from the disk, MB")
    table.add_row(f"{row.checkpoint}, {row.bytes / 1e6:.0f} MB", str(row.converted_s), str(row.converted_disk_mb))
    table.add_row("the cache", str(row.cached_s), str(row.cached_disk_mb))
    table.add_row("times as long", str(row.ratio), "")
    return table


@benchmark_command("loading")
def main(short: bool, device: Device, out: Path) -> None:
    """Time a stage's weights from an FP8 checkpoint with an empty weight cache, and from the cache that this fills.

    Medians of turns, and the quartiles between which half of the turns lie.
    """
    os.environ[DEVICE_VARIABLE] = device
    machine = Machine.here()
    # Processes started from here on have the environment of a host's only stage.
    [share] = share_cores(sorted(os.sched_getaffinity(0)), 1)
    apply_share(share, os.environ)
    size, turns = ("tiny-fp8", SHORT_TURNS) if short else ("mini576-fp8", TURNS)
    model = write_checkpoint(size, out / size)
    row = row_of(model, measure(model, turns))
    targets = [] if short else _targets(row)
    report = Report(benchmark="loading", device=device, short=short, machine=machine, rows=[row], targets=targets)
    publish(report, _table(row), out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.loading")
