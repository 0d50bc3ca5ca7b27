"""`galaxyline cache list`, `verify` and `prune`: the command line of the weight cache."""

import sys
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from api.cli.options import options_of
from api.cli.parameters import result_console
from api.client.progress import LongWork
from api.settings.engine import EngineSettings
from stages.options import TRANSFORM_VERSION
from weights.cache.inventory import CacheEntry, cache_entries, damage_of, remove_entries
from weights.sizes import in_words

DAMAGED = 1
"""Exit code of a verification that finds damage."""

DAY_S = 86400

WIDE_COLUMNS = 160
"""The width of the table of entries where it does not go to a terminal."""


cache_dir_option = options_of(EngineSettings, only={"cache_dir"})


@click.group("cache")
def cache_group() -> None:
    """List, check and clear the converted weights below --cache-dir."""


@cache_group.command("list")
@cache_dir_option
def list_command(cache_dir: Path) -> None:
    """List the entries of the weight cache."""
    entries = cache_entries(cache_dir)
    table = Table("part", "device", "dtype", "mesh", "transform", "fingerprint", "size", "last used", "state")
    for entry in entries:
        table.add_row(*_cells(entry))
    result_console(WIDE_COLUMNS).print(table)
    click.echo(f"{len(entries)} entries, {in_words(sum(entry.bytes for entry in entries))}, in {cache_dir}")


@cache_group.command("verify")
@cache_dir_option
def verify_command(cache_dir: Path) -> None:
    """Read every byte of the weight cache and name what is damaged; the exit code is 1 if anything is."""
    entries = [entry for entry in cache_entries(cache_dir) if entry.key is not None]
    damaged = 0
    with LongWork(Console(stderr=True)).steps("Checking", len(entries)) as done:
        for entry in entries:
            if files := damage_of(entry):
                damaged += 1
                click.echo(f"{entry.path.name} is damaged: {', '.join(files)}")
            done(entry.path.name)
    click.echo(f"{len(entries) - damaged} of {len(entries)} entries in {cache_dir} are sound.")
    if damaged:
        click.echo("Damaged entries are converted again when they are needed; `galaxyline cache prune` removes them.")
        sys.exit(DAMAGED)


@cache_group.command("prune")
@cache_dir_option
@click.option("--older-than", type=click.FloatRange(min=0), help="Also entries that were not used for so many days.")
@click.option("--all", "everything", is_flag=True, help="All entries.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
def prune_command(cache_dir: Path, older_than: float | None, everything: bool, dry_run: bool) -> None:
    """Remove entries that this version cannot use: damaged, or converted by another version.

    Directories that are not cache entries are left alone. A running pipeline keeps the files that it has loaded.
    """
    used_since = None if older_than is None else time.time() - older_than * DAY_S
    chosen = [entry for entry in cache_entries(cache_dir) if _is_pruned(entry, used_since, everything)]
    for entry in chosen:
        click.echo(f"{'would remove' if dry_run else 'removing'} {entry.path.name} ({in_words(entry.bytes)})")
    if not dry_run and cache_dir.is_dir():
        remove_entries(cache_dir, chosen)
    click.echo(f"{len(chosen)} entries, {in_words(sum(entry.bytes for entry in chosen))}")


def _is_pruned(entry: CacheEntry, used_since: float | None, everything: bool) -> bool:
    if entry.key is None:
        return False
    if everything or entry.key.transform != TRANSFORM_VERSION:
        return True
    if used_since is not None and entry.used < used_since:
        return True
    return not entry.is_complete or bool(damage_of(entry))


def _cells(entry: CacheEntry) -> Iterable[str]:
    used = datetime.fromtimestamp(entry.used, tz=timezone.utc).strftime("%Y-%m-%d %H:%M")
    size = in_words(entry.bytes)
    key = entry.key
    if key is None:
        return entry.path.name, "", "", "", "", "", size, used, "no cache entry"
    mesh = f"{key.rows}x{key.columns}"
    state = "complete" if entry.is_complete else "incomplete"
    return key.part, key.device, key.dtype, mesh, f"{key.transform}", key.fingerprint[:12], size, used, state
