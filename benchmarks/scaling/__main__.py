"""`python -m benchmarks.scaling`: how the throughput of a pipeline grows with its stages.

The real server, engine, Ray actors and sockets stream to clients in another process. On the timed device stages take
the time of real ones without computing, so that a machine of a few cores can run many of them: the difference to the
ideal is the cost of the program itself.
"""

import tempfile
from pathlib import Path

import click

from benchmarks.scaling.case import cases
from benchmarks.scaling.figures import ScalingRow, chart, row, table, targets
from benchmarks.scaling.run import Effort, measure
from benchmarks.support.machine import Machine
from benchmarks.support.options import benchmark_command
from benchmarks.support.report import Report, publish
from stages.device import Device

FULL = Effort(warm_s=5.0, measured_s=20.0, probes=30)
SHORT = Effort(warm_s=1.0, measured_s=3.0, probes=3)


@benchmark_command("scaling", ("timed", "embedded", "ttnn"))
@click.option("--only", type=int, multiple=True, help="Only pipelines of so many stages; may be repeated.")
def main(short: bool, device: Device, out: Path, only: tuple[int, ...]) -> None:
    """Measure tokens a second of pipelines of ever more stages, over what they would reach if only stages took time.

    On the timed device: equal stages of a time that is given, and DeepSeek-R1 in the times that are predicted for a
    Galaxy row each. On others: the sample model, beside the times of its own steps.
    """
    machine = Machine.here()
    out.mkdir(parents=True, exist_ok=True)
    effort = SHORT if short else FULL
    rows: list[ScalingRow] = []
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        for case in cases(device, Path(name), short=short):
            if only and case.stages not in only:
                continue
            is_first = not rows
            timeline = out / f"scaling.{device}.timeline.json" if is_first else None
            rows.append(row(measure(case, device, Path(name) / "cache", effort, timeline), machine.cores))
            click.echo(f"{case.name}, {case.stages} stages: {rows[-1].over_ideal:.3f} of the ideal", err=True)
    if rows:
        (out / f"scaling.{device}.svg").write_text(chart(rows), encoding="utf-8")
    report = Report(benchmark="scaling", device=device, short=short, machine=machine, rows=rows, targets=targets(rows))
    publish(report, table(rows), out)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.scaling")
