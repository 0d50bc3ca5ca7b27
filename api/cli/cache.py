"""The command line of the weight cache: `galaxyline convert`, and `galaxyline cache list`, `verify` and `prune`."""

import functools
import os
import sys
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from api.cli.convert import ConvertSettings, convert
from api.cli.options import (
    cache_dir_option,
    dtype_option,
    load_format_option,
    rows_per_stage_option,
    seed_option,
    weights_device_option,
)
from api.cli.weight_dtype_options import take_weight_dtypes, weight_dtype_options
from api.client.progress import LongWork
from api.settings.environment import note_environment
from api.settings.parameters import with_options
from api.text.model_source import resolve_model
from stages.options import TRANSFORM_VERSION
from weights.cache.inventory import CacheEntry, cache_entries, damage_of, remove_entries
from weights.sizes import in_words

DAMAGED = 1
"""Exit code of a verification that finds damage."""

DAY_S = 86400


@click.command("convert")
@click.argument("model", required=False)
@click.option("--model-path", help="As MODEL.  [default: $DEEPSEEK_V3_HF_MODEL, $HF_MODEL, then the sample]")
@cache_dir_option
@dtype_option
@load_format_option
@seed_option
@weights_device_option
@rows_per_stage_option
@functools.partial(with_options, options=weight_dtype_options)
def convert_command(model: str | None, model_path: str | None, seed: int | None, **given: Any) -> None:
    """Convert the weights of MODEL, a directory or a hub id, into the weight cache, for any split into stages.

    Serving does the same on first use. What the cache has already is left as it is, so a conversion that was cut off
    goes on where it stopped.
    """
    note_environment(os.environ)
    source = resolve_model(model or model_path, os.environ)
    dtypes = take_weight_dtypes(given)
    settings = ConvertSettings(source=source, seed=seed or 0, weight_dtypes=dtypes, **given)
    convert(settings, click.echo, LongWork(Console(stderr=True)))


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
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    click.echo(f"{len(entries)} entries, {in_words(sum(entry.bytes for entry in entries))}, in {cache_dir}")


@cache_group.command("verify")
@cache_dir_option
def verify_command(cache_dir: Path) -> None:
    """Read every byte of the weight cache and name what is damaged; the exit code is then 1."""
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

    Directories that are no cache entries are left alone. A running pipeline keeps the files that it has loaded.
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
