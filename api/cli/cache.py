"""`galaxyline cache list`, `verify` and `prune`: the command line of the weight cache."""

import os
import sys
import time
from pathlib import Path

import click
import msgspec

from api.cli.options import options_of
from api.cli.parameters import LoggedCommand, long_work, result_console
from api.errors import OptionError
from api.settings.engine import EngineSettings, cache_directory
from stages.options import TRANSFORM_VERSION
from weights.cache.inventory import CacheEntry, cache_entries, damage_of, remove_entries
from weights.sizes import counted, in_words

DAMAGED = 1
"""Exit code of a verification that finds damage."""

DAY_S = 86400


cache_dir_option = options_of(EngineSettings, only={"cache_dir"})


@click.group("cache")
def cache_command() -> None:
    """List, check and clear the converted weights below --cache-dir."""


@cache_command.command("list", cls=LoggedCommand)
@cache_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print the entries as JSON.")
def list_command(cache_dir: Path | None, as_json: bool) -> None:
    """List the entries of the weight cache."""
    from api.cli.tables import EntryLine, cache_table  # noqa: PLC0415 - imports rich

    directory = cache_directory(cache_dir, os.environ)
    entries = cache_entries(directory)
    if as_json:
        lines = [{"name": entry.path.name, **msgspec.to_builtins(EntryLine.of(entry))} for entry in entries]
        click.echo(msgspec.json.encode({"directory": str(directory), "entries": lines}))
    elif not directory.exists():
        click.echo(_missing(directory))
    elif not entries:
        click.echo(f"Nothing is in {directory}.")
    else:
        result_console().print(cache_table(entries))
        click.echo(f"{_summary(entries)}, in {directory}")


@cache_command.command("verify", cls=LoggedCommand)
@cache_dir_option
def verify_command(cache_dir: Path | None) -> None:
    """Read every byte of the weight cache and name what is damaged; the exit code is 1 if anything is."""
    directory = cache_directory(cache_dir, os.environ)
    if not directory.exists():
        click.echo(_missing(directory))
        return
    entries = [entry for entry in cache_entries(directory) if entry.key is not None]
    if not entries:
        click.echo(f"Nothing is to be checked in {directory}.")
        return
    damaged = 0
    with long_work().steps("Checking", len(entries)) as done:
        for entry in entries:
            if files := damage_of(entry):
                damaged += 1
                click.echo(f"{entry.path.name} is damaged: {', '.join(files)}")
            done(entry.path.name)
    click.echo(f"{len(entries) - damaged} of {counted(len(entries), 'entry')} in {directory} are sound.")
    if damaged:
        click.echo("Damaged entries are converted again when they are needed; `galaxyline cache prune` removes them.")
        sys.exit(DAMAGED)


@cache_command.command("prune", cls=LoggedCommand)
@cache_dir_option
@click.option("--older-than", type=click.FloatRange(min=0), help="Also entries that were not used for so many days.")
@click.option("--all", "everything", is_flag=True, help="All entries.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask before --all removes what could still be used.")
def prune_command(cache_dir: Path | None, older_than: float | None, everything: bool, dry_run: bool, yes: bool) -> None:
    """Remove entries that this version cannot use: damaged, or converted by another version.

    Directories that are not cache entries are left alone. A running pipeline keeps the files that it has loaded.
    """
    directory = cache_directory(cache_dir, os.environ)
    used_since = None if older_than is None else time.time() - older_than * DAY_S
    chosen = [entry for entry in cache_entries(directory) if _is_pruned(entry, used_since, everything)]
    if not directory.exists():
        click.echo(_missing(directory))
        return
    if not chosen:
        click.echo(f"Nothing is to be removed from {directory}.")
    if chosen and everything and not (dry_run or yes):
        _ask(chosen, directory)
    for entry in chosen:
        click.echo(f"{'would remove' if dry_run else 'removing'} {entry.path.name} ({in_words(entry.bytes)})")
    if not dry_run:
        # Leftovers of conversions that were cut off go too.
        remove_entries(directory, chosen)
    if chosen:
        click.echo(_summary(chosen))


def _ask(chosen: list[CacheEntry], directory: Path) -> None:
    """Asks whether all entries are to go. Raises OptionError where nobody can answer, and Abort where not."""
    if not sys.stdin.isatty():
        raise OptionError(f"--all removes {_summary(chosen)}, from {directory}: add --yes where no terminal can ask.")
    click.confirm(f"Remove {_summary(chosen)}, from {directory}?", abort=True, err=True)


def _is_pruned(entry: CacheEntry, used_since: float | None, everything: bool) -> bool:
    if entry.key is None:
        return False
    if everything or entry.key.transform != TRANSFORM_VERSION:
        return True
    if used_since is not None and entry.used < used_since:
        return True
    return entry.state != "complete" or bool(damage_of(entry))


def _summary(entries: list[CacheEntry]) -> str:
    return f"{counted(len(entries), 'entry')}, {in_words(sum(entry.bytes for entry in entries))}"


def _missing(directory: Path) -> str:
    return f"No weight cache is at {directory}: it is made with the first model that is converted or served."
