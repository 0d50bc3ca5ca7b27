"""How a stage's process is set up: its cores and threads, and what it imports before it is assigned a stage.

Nothing here may import torch before the environment is set.
"""

import importlib
import itertools
import os
import sys
import threading
from collections.abc import MutableMapping, Sequence
from pathlib import Path

import msgspec

from actors.stage.runner import runner_factory
from stages.device import DEVICE_VARIABLE, PROFILES, Device

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SPINS = "20000"
"""Turns that a thread of GNU's OpenMP waits for the others before it sleeps: about a millisecond, so that threads stay
awake between two operators; with a tenth of it, steps of one user took 1.2 times as long. By default it spins for many
more, and where a front end or another program holds the core of the thread that it waits for, the two keep each other
from running: steps took 3 to 20 times as long."""
NICENESS = 5
"""Niceness of the thread that imports while stages serve: where both want a core it gets a quarter of it."""


class CoreShare(msgspec.Struct, frozen=True):
    """One stage's share of its host: how many threads it has, and the cores they are bound to, None for no binding."""

    threads: int
    cores: tuple[int, ...] | None


def share_cores(cores: Sequence[int], stages: int) -> list[CoreShare]:
    """Divides a host's cores among its stages.

    Where there are enough cores, each stage has its own run of neighbouring ones, of even size; the later stages get
    what is left over, as the last one also holds the head. Where there are too few, each has one thread, and the kernel
    shares out the cores.
    """
    if stages > len(cores):
        return [CoreShare(1, None)] * stages
    ordered = sorted(cores)
    bounds = [len(ordered) * stage // stages for stage in range(stages + 1)]
    runs = [tuple(ordered[begin:end]) for begin, end in itertools.pairwise(bounds)]
    return [CoreShare(len(run), run) for run in runs]


def apply_share(share: CoreShare, environment: MutableMapping[str, str]) -> None:
    """Binds every thread of this process, sets its thread counts and, unless the user has, how long threads spin.

    Where torch is imported already, only `set_torch_threads` changes how many threads it uses.
    """
    set_thread_variables(share.threads, environment)
    if share.cores is None:
        return
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), share.cores)
        except ProcessLookupError:
            continue  # The thread ended while we went through the list.


def set_thread_variables(threads: int, environment: MutableMapping[str, str]) -> None:
    """Sets the variables that libraries read when they are imported: how many threads they use and, unless the user has
    set it, how long these spin.
    """
    for variable in THREAD_VARIABLES:
        environment[variable] = str(threads)
    if not any(variable in environment for variable in WAIT_VARIABLES):
        environment["GOMP_SPINCOUNT"] = SPINS


def set_torch_threads(threads: int) -> None:
    """Sets torch's threads where it has been imported already, and has read another count then."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


class Preparation(msgspec.Struct, frozen=True, kw_only=True):
    """What the stages of one host have in common, `neighbours` of them; see `StageSetup`."""

    device: Device
    runner: str
    neighbours: int
    environment: dict[str, str]
    stderr: str | None = None


def prepare(preparation: Preparation) -> None:
    """Imports ahead while stages serve. Runs in a thread of its own, whose niceness it raises. Raises StartError."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    import_ahead(preparation)


def import_ahead(preparation: Preparation) -> None:
    """Sets the environment that imports read, then imports.

    ttnn looks for the chips that it may see when it is imported, and only a stage's own environment names these: for
    ttnn, no more than torch is imported. Raises StartError if the runner cannot be found.
    """
    os.environ[DEVICE_VARIABLE] = preparation.device
    os.environ.update(preparation.environment)
    # Cores are bound, and threads counted anew, when the process is assigned a stage.
    share = share_cores(sorted(os.sched_getaffinity(0)), preparation.neighbours)[0]
    set_thread_variables(share.threads, os.environ)
    if PROFILES[preparation.device].has_chips:
        importlib.import_module("torch")
    else:
        runner_factory(preparation.runner)
