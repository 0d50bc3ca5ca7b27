"""`python -m benchmarks`: all of them, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import click

from actors.options import Device
from benchmarks.options import benchmark_command

BENCHMARKS = ("hop", "overhead", "model")


@benchmark_command("benchmarks")
def main(short: bool, device: Device, out: Path) -> None:
    """Run hop, overhead and model, one after the other: each prints a table and writes its figures as JSON."""
    options = ["--device", device, "--out", str(out), *(["--short"] if short else [])]
    for name in BENCHMARKS:
        code = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=False).returncode
        if code:
            click.get_current_context().exit(code)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
