"""Leaks: resources that a server holds after the faults and did not hold before, and growth of its memory."""

import asyncio
import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

from benchmarks.chaos.server import ChaosServer
from benchmarks.support.server_process import title

SAMPLE_SECONDS = 1.0
WARM_UP_MINUTES = 2.0
SETTLE_SECONDS = 60.0
SETTLE_POLL_SECONDS = 0.5
SPARE_THREADS = 4
"""Threads of a kind that may be added: pools of Ray and asyncio start them as needed. A leak grows with each fault."""
SHARED_MEMORY = Path("/dev/shm")  # nosec B108 # it is only listed


class Holdings(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of resources that an idle server holds, by their names."""

    counts: dict[str, int]

    @classmethod
    def of(cls, server: ChaosServer) -> "Holdings":
        """Counts the resources that a server holds now."""
        counts = {
            "descriptors of the front end": server.process.num_fds(),
            "descriptors of the engine": server.engine.num_fds(),
            "socket files": sum(1 for _ in server.directory.glob("galaxyline-*/*")),
            "shared memory": len(_shared_memory(server.processes)),
        }
        kinds = [f"processes {_name(process)}" for process in server.processes]
        kinds += [f"threads {name} of the front end" for name in _threads(server.process)]
        kinds += [f"threads {name} of the engine" for name in _threads(server.engine)]
        return cls(counts=counts | Counter(kinds))

    def grown(self, before: "Holdings") -> dict[str, int]:
        """The resources of which there are more than before, and by how many, without threads that pools explain."""
        return {
            name: count - before.counts.get(name, 0)
            for name, count in sorted(self.counts.items())
            if count > before.counts.get(name, 0) + (SPARE_THREADS if name.startswith("threads ") else 0)
        }


def settled(server: ChaosServer, before: Holdings) -> dict[str, int]:
    """The resources of which the server still holds more than before after SETTLE_SECONDS, and by how many."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (grown := Holdings.of(server).grown(before)) and time.monotonic() < deadline:
        time.sleep(SETTLE_POLL_SECONDS)
    return grown


class Memory:
    """The resident memory of some processes over time."""

    def __init__(self, processes: dict[str, psutil.Process]) -> None:
        self._processes = processes
        self._times: list[float] = []
        self._bytes: dict[str, list[int]] = {name: [] for name in processes}

    async def watch(self) -> None:
        """Takes samples until it is cancelled."""
        while True:
            self._times.append(time.monotonic())
            for name, process in self._processes.items():
                self._bytes[name].append(process.memory_info().rss)
            await asyncio.sleep(SAMPLE_SECONDS)

    def percent_per_minute(self) -> dict[str, float]:
        """The growth of each process from minute WARM_UP_MINUTES on, or in the second half of a shorter run."""
        return {name: slope(self._times, sizes) for name, sizes in self._bytes.items()}


def slope(times: Sequence[float], sizes: Sequence[int]) -> float:
    """Growth in percent of the first size per minute, by a line through all later samples; `times` are in seconds."""
    warm_at = min(times[0] + 60 * WARM_UP_MINUTES, (times[0] + times[-1]) / 2)
    first = next(index for index, at in enumerate(times) if at >= warm_at)
    if len(times) - first < 2:
        return 0.0
    line = statistics.linear_regression(times[first:], sizes[first:])
    return line.slope * 60 / sizes[first] * 100


def _name(process: psutil.Process) -> str:
    """The title of a process, or its program without the directory."""
    return Path(title(process)).name.partition(".")[0] or "(gone)"


def _threads(process: psutil.Process) -> list[str]:
    """The names of a process's threads, without the numbers of threads of one kind."""
    names = []
    for thread in Path(f"/proc/{process.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append((thread / "comm").read_text(encoding="utf-8").strip().rstrip("0123456789"))
    return names


def _shared_memory(processes: Sequence[psutil.Process]) -> set[str]:
    """The shared memory objects that any of these processes has mapped."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            found |= {each.path for each in process.memory_maps() if each.path.startswith(f"{SHARED_MEMORY}/")}
    return found
