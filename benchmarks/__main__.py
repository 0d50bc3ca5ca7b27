"""`python -m benchmarks`: all benchmarks, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import click

from benchmarks.support.options import benchmark_command
from stages.device import Device

BENCHMARKS = (
    "hop",
    "overhead",
    "model",
    "trace",
    "sampling",
    "loading",
    "scaling",
    "replicas",
    "grammars",
    "prefix",
    "drafts",
    "overload",
    "memory",
    "stopping",
    "start",
)


@benchmark_command("benchmarks")
def main(short: bool, device: Device, out: Path) -> None:
    """Run all benchmarks, one after the other: each prints a table and writes its figures as JSON."""
    options = ["--out", str(out), *(["--short"] if short else [])]
    for name in BENCHMARKS:
        # Scaling, overload and memory need stages that wait, not stages that share one processor.
        on = "timed" if name in {"overload", "memory"} or (name == "scaling" and device == "embedded") else device
        on = "embedded" if name in {"sampling", "grammars", "prefix", "drafts", "stopping", "start"} else on
        command = [sys.executable, "-m", f"benchmarks.{name}", "--device", on, *options]
        code = subprocess.run(command, check=False).returncode
        if code:
            click.get_current_context().exit(code)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
