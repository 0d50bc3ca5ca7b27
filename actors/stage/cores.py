"""Which cores a stage computes on, so that stages of one host do not get into each other's way."""

import itertools
import os
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path

import msgspec

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
SPINS = "20000"
"""Turns that a thread of GNU's OpenMP waits for the others before it sleeps: about a millisecond, so that threads stay
awake between two operators; with a tenth of it, steps of one user took 1.2 times as long. By default it spins for many,
and where a front end or a stranger holds the core of the thread that it waits for, the two keep each other from
running: steps took 3 to 20 times as long."""


class CoreShare(msgspec.Struct, frozen=True):
    """What one stage gets: so many threads, bound to these cores, or to none."""

    threads: int
    cores: tuple[int, ...] | None


def share_cores(cores: Sequence[int], stages: int) -> list[CoreShare]:
    """Divides a host's cores among its stages.

    Enough cores: each stage has its own run of neighbouring ones, of even size, the later ones getting what is left
    over, as the last stage also holds the head. Too few: one thread each, and the kernel shares them out.
    """
    if stages > len(cores):
        return [CoreShare(1, None)] * stages
    ordered = sorted(cores)
    bounds = [len(ordered) * stage // stages for stage in range(stages + 1)]
    runs = [tuple(ordered[begin:end]) for begin, end in itertools.pairwise(bounds)]
    return [CoreShare(len(run), run) for run in runs]


def apply_share(share: CoreShare, environment: MutableMapping[str, str]) -> None:
    """Binds every thread of this process, sets its thread counts and, unless the user has, how long threads spin.

    Where torch is imported already, only `tell_torch` changes how many threads it uses.
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
    """Sets what libraries read when they are imported: how many threads they use and, unless the user has, how long
    these spin.
    """
    for variable in THREAD_VARIABLES:
        environment[variable] = str(threads)
    if not any(variable in environment for variable in WAIT_VARIABLES):
        environment["GOMP_SPINCOUNT"] = SPINS


def tell_torch(threads: int) -> None:
    """Sets torch's threads where it has been imported, and has read another count then."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
