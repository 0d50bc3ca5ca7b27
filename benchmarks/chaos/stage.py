"""The stage of the chaos benchmark's server, whose device fails on order."""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from actors.stage.runner import OnProgress, StageRunner
from stages.kv.inventory import Inventory
from stages.options import StageOptions
from stages.pending import StageOutput
from stages.plan import StageSpec
from stages.stage import Stage
from stages.step import Step

RUNNER = "benchmarks.chaos.stage:load"
DIRECTORY_VARIABLE = "GALAXYLINE_CHAOS_DIRECTORY"
"""The variable with the directory of the orders, which is set for the benchmark's server only."""

HANG_SECONDS = 3600.0


class DeviceFaultError(Exception):
    """The error that the device raises on order."""


class FaultyStage:
    """A stage that reads the file `order` before a step, deletes it and does what it contains."""

    def __init__(self, runner: StageRunner, order: Path) -> None:
        self._runner = runner
        self._order = order

    def step(self, step: Step, hidden: memoryview) -> StageOutput:
        """See `StageRunner`."""
        with contextlib.suppress(FileNotFoundError):
            order = self._order.read_text(encoding="ascii")
            self._order.unlink()
            ACTS[order]()
        return self._runner.step(step, hidden)

    def load_blocks(self, step: Step) -> list[int]:
        """See `StageRunner`."""
        return self._runner.load_blocks(step)

    def inventory(self, version: int) -> Inventory:
        """See `StageRunner`."""
        return self._runner.inventory(version)

    def close(self) -> None:
        """See `StageRunner`."""
        self._runner.close()


def load(spec: StageSpec, options: StageOptions, on_progress: OnProgress) -> StageRunner:
    """Loads a faulty stage, as a `RunnerFactory`."""
    return FaultyStage(
        Stage.load(spec, options, on_progress), order_file(Path(os.environ[DIRECTORY_VARIABLE]), spec.index)
    )


def order_file(directory: Path, stage: int) -> Path:
    """The file in which a stage looks for its order."""
    return directory / f"order-{stage}"


def give_order(directory: Path, stage: int, order: str) -> Path:
    """Orders a stage to do something before its next step; returns the file, which is gone when the stage does it."""
    file = order_file(directory, stage)
    whole = file.with_suffix(".new")
    whole.write_text(order, encoding="ascii")
    whole.rename(file)
    return file


def is_obeyed(order: Path) -> bool:
    """Whether the stage has read the order."""
    return not order.exists()


def withdraw(order: Path) -> None:
    """Withdraws an order."""
    order.unlink(missing_ok=True)


def _raise() -> None:
    raise DeviceFaultError("the device was told to fail")


def _cut() -> None:
    """Shuts down the connection from the previous stage, or from the engine, for both sides."""
    for connection in psutil.Process().net_connections("unix"):
        if "galaxyline-" in connection.laddr:
            # The owner keeps its descriptor.
            with socket.socket(fileno=os.dup(connection.fd)) as connected:
                connected.shutdown(socket.SHUT_RDWR)


ACTS: dict[str, Callable[[], None]] = {"raise": _raise, "hang": lambda: time.sleep(HANG_SECONDS), "cut": _cut}
