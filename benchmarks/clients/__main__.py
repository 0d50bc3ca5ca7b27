"""`python -m benchmarks.clients`: real clients against a server of the sample model.

Each is installed in an environment of its own, completes prompts and talks, and is judged by its own result. It is the
newest release that the package index has, so that this shows what new releases of clients expect.
"""

import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from benchmarks.clients.client import Outcome, try_client
from benchmarks.clients.parts import CLIENTS, PARTS
from benchmarks.support.ports import free_port
from benchmarks.support.report import WIDTH, table_of
from benchmarks.support.server_process import running_server


def report(outcomes: Sequence[Outcome]) -> None:
    """Prints a table, below what the clients said that failed."""
    table = table_of("client", "version", "part", "passed")
    console = Console(width=None if Console().is_terminal else WIDTH)
    for outcome in outcomes:
        table.add_row(outcome.client, outcome.version, outcome.part, "yes" if outcome.passed else "no")
        if outcome.log:
            console.print(f"{outcome.client}, {outcome.part}:\n{outcome.log}\n", markup=False, highlight=False)
    console.print(table)


@click.command("clients", context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--only", multiple=True, type=click.Choice([client.name for client in CLIENTS]), help="Try this one; repeatable."
)
@click.option(
    "--part",
    multiple=True,
    type=click.Choice(sorted({part.name for part in PARTS})),
    help="Try only this of each client; repeatable.",
)
@click.option(
    "--environments",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the environments here, and use what is there.  [default: a temporary directory]",
)
@click.option("--url", help="Ask this server of the sample model.  [default: one of its own on loopback]")
def main(only: tuple[str, ...], part: tuple[str, ...], environments: Path | None, url: str | None) -> None:
    """Try clients against a server of the sample model; exits with 1 where one fails."""
    outcomes: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        root = environments or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clients-")))
        if url is None:
            port = free_port()
            command = [sys.executable, "-m", "api.cli", "serve", "--port", str(port), "--stages", "1", "--no-spare"]
            url = stack.enter_context(running_server(command, port, 1)).url
        for client in CLIENTS:
            parts = [each for each in PARTS if each.client == client and (not part or each.name in part)]
            if parts and (not only or client.name in only):
                outcomes += try_client(client, parts, url, root.resolve())
    report(outcomes)
    if not all(outcome.passed for outcome in outcomes):
        click.get_current_context().exit(1)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.clients")
