"""`python -m benchmarks.chaos`: whether anything is lost while stages are killed, stopped and cut off, or devices fail.

The real server with the sample model in float32 is under load by clients that complete prompts and chat, with thoughts,
tools and grammars. Each answer is compared with the one that the server gave before the first fault. The last line is a
summary in JSON; the exit code is 1 if anything was lost, and from FULL_MINUTES on also if a bound is not kept.
"""

import asyncio
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
import uvloop
from rich.table import Table

from benchmarks.chaos.chats import conversations, questions_of_other_routes
from benchmarks.chaos.damage import excess
from benchmarks.chaos.faults import KINDS, FaultRow, Faults
from benchmarks.chaos.findings import Findings, Run, losses_of, recoveries_in, speeds_of
from benchmarks.chaos.leaks import Holdings, Memory, settled
from benchmarks.chaos.load import ClientError, Load, client
from benchmarks.chaos.requests import Asked, questions
from benchmarks.chaos.server import ChaosServer, chaos_server
from benchmarks.support.machine import Machine
from benchmarks.support.options import DEFAULT_OUT, BenchmarkCommand
from benchmarks.support.report import Report, publish, table_of
from benchmarks.support.server_process import ServerError

QUESTIONS = 32
CONVERSATIONS = 16
FULL_MINUTES = 10.0


async def work(run: Run, server: ChaosServer, findings: Findings) -> Holdings:
    """Runs the load and the faults; returns the holdings of the server before. Raises ServerError or ClientError."""
    loop = asyncio.get_running_loop()
    chats: list[Asked] = [*conversations(CONVERSATIONS, run.seed), *questions_of_other_routes(run.seed)]
    asked: list[Asked] = [*questions(QUESTIONS, run.seed), *chats]
    load = Load(server.url, asked, run.seed)
    findings.totals = load.totals
    await load.learn()
    async with client() as http:
        before = await server.state(http)
    holdings = Holdings.of(server)
    memory = Memory({"front end": server.process, "engine": server.engine})
    watching = asyncio.create_task(memory.watch())
    began_at = loop.time()
    async with client() as http, client() as asking:
        load.start(run.clients, http)
        faults = Faults(server, load, asking, run.seed)
        findings.faults = faults.rows
        try:
            while loop.time() < began_at + run.seconds and not load.has_given_up:
                if run.has_faults:
                    await faults.strike()
                await asyncio.sleep(run.pause_s)
            await load.stop()
        finally:
            watching.cancel()
            findings.seconds = loop.time() - began_at
        after = await server.state(asking)
    findings.slopes = memory.percent_per_minute()
    findings.restarts = sum(after.restarts) - sum(before.restarts)
    findings.draft_tokens = after.draft_tokens - before.draft_tokens
    return holdings


def measure(run: Run, directory: Path) -> Findings:
    """Makes one run; returns its findings up to a failure, if there is one."""
    findings = Findings()
    memories: list[Path] = []
    try:
        with chaos_server(directory, stages=run.stages, clients=run.clients) as server:
            holdings = uvloop.run(work(run, server, findings))
            findings.leaks = settled(server, holdings) | excess(server)
            memories = server.memories()
    except (ServerError, ClientError) as error:
        findings.failure = str(error)
    findings.server_recoveries = recoveries_in(directory / "server.log")
    left = sorted(str(path) for path in [*directory.glob("galaxyline-*"), *memories] if path.exists())
    if left:
        findings.leaks |= dict.fromkeys(left, 1)
    return findings


def _table(rows: Sequence[FaultRow]) -> Table:
    table = table_of("fault", "times", "recovery, s: least", "median", "most")
    for kind in KINDS:
        of_kind = [row for row in rows if row.kind == kind]
        took = [row.recovery_s for row in of_kind if row.recovery_s is not None]
        figures = [f"{figure:.2f}" for figure in (min(took), statistics.median(took), max(took))] if took else [""] * 3
        table.add_row(kind, str(len(of_kind)), *figures)
    return table


@click.command("chaos", cls=BenchmarkCommand, context_settings={"max_content_width": 120})
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=FULL_MINUTES, show_default=True)
@click.option("--seed", type=int, default=1, show_default=True, help="Of faults, victims and questions.")
@click.option("--clients", type=click.IntRange(min=1), default=32, show_default=True, help="Requests at once.")
@click.option("--stages", type=click.IntRange(min=2), default=4, show_default=True)
@click.option("--without-faults", is_flag=True, help="No faults, and nothing may be restarted.")
@click.option(
    "--pause", "pause_s", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Between faults."
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=DEFAULT_OUT, show_default=True)
def main(
    minutes: float,
    seed: int,
    clients: int,
    stages: int,
    without_faults: bool,
    pause_s: float,
    out: Path,
) -> None:
    """Hurt a server's stages at random while clients ask, and count what the clients notice."""
    machine = Machine.here()
    run = Run(
        seconds=60 * minutes, seed=seed, clients=clients, stages=stages, has_faults=not without_faults, pause_s=pause_s
    )
    # Ray's sockets need a short path.
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    findings = measure(run, directory)
    summary = findings.summary()
    losses, speeds = losses_of(run, summary), speeds_of(run, summary)
    is_short = minutes < FULL_MINUTES
    report = Report(
        benchmark="chaos",
        device="embedded",
        short=is_short,
        machine=machine,
        rows=findings.faults,
        targets=[*losses, *speeds],
    )
    publish(report, _table(findings.faults), out)
    for sentence in [*findings.totals.errors, *filter(None, [findings.failure])]:
        click.echo(sentence, err=True)
    is_met = all(target.is_met for target in (losses if is_short else [*losses, *speeds]))
    if is_met:
        shutil.rmtree(directory)
    else:
        click.echo(f"The server's log is {directory / 'server.log'}.", err=True)
    click.echo(msgspec.json.encode(summary).decode())
    click.get_current_context().exit(0 if is_met else 1)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.chaos")
