"""An mpirun without programs: it holds a placeholder for each rank, whose identity a stage takes over.

ttnn's sockets between processes need MPI, and MPI a launcher; the stages are Ray's to start. mpirun and the stages'
processes have to be of the same Open MPI release series as ttnn's own library (5.0).
"""

import asyncio
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from actors.errors import LinkError, PipelineError, StartError
from actors.mpi import daemon_agent, placeholder
from stages.step import Host

END_SECONDS = 5.0
COMPLAINTS_MAX = 20
"""Lines of mpirun's own output that are kept for the error that reports its end."""
LOOPBACK_INTERFACE = "lo"
_RANK_LINE = re.compile(r"RANK (?P<rank>\d+) (?P<pid>\d+)")
"""The line that a placeholder prints."""


def mpirun_command(hosts: Sequence[Host], here: str, agent: str) -> list[str]:
    """Returns the command line: one rank a stage, in the order of `hosts`, whose equal members stand together.

    `here` is the node of this process. Where all ranks are on it, nothing but its loopback interface is used.
    """
    slots = [f"{name}:{len(list(same))}" for name, same in itertools.groupby(host.name for host in hosts)]
    settings = {"plm_ssh_agent": agent}
    options = ["--np", str(len(hosts)), "--host", ",".join(slots), "--map-by", "slot", "--bind-to", "none"]
    # Daemons stay children of what started them, so that they can be ended with it.
    options.append("--leave-session-attached")
    for name, value in settings.items():
        options += ["--prtemca", name, value]
    # Shared memory would leave its files behind where a rank is killed.
    options += ["--mca", "pml", "ob1", "--mca", "btl", "self,tcp"]
    if all(host.node_id == here for host in hosts):
        options += ["--mca", "btl_tcp_if_include", LOOPBACK_INTERFACE]
        options += ["--pmixmca", "ptl_tcp_if_include", LOOPBACK_INTERFACE]
    program = [sys.executable, "-I", placeholder.__file__]
    return [str(Path(sys.executable).with_name("mpirun")), *options, *program]


def mpirun_environment(directory: Path) -> dict[str, str]:
    """Returns mpirun's environment: its files go to `directory`, and it may be run by root, as in a container."""
    environment = {**os.environ, "TMPDIR": str(directory)}
    if os.getuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return environment


def write_agent(path: Path, socket_path: str) -> None:
    """Writes the program that mpirun starts its daemons with, a line that calls `daemon_agent`."""
    command = shlex.join([sys.executable, "-I", daemon_agent.__file__, socket_path])
    path.write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
    path.chmod(0o700)


class Mpirun:
    """A running mpirun; `close` ends all its processes.

    `ranks` has the pid of each rank's placeholder, a process of the rank's host; it is complete when `start` returns.
    """

    def __init__(self, process: "subprocess.Popen[str]", size: int, lost: Callable[[LinkError], None]) -> None:
        self._process = process
        self._size = size
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._complete: asyncio.Future[None] = self._loop.create_future()
        self._complaints: deque[str] = deque(maxlen=COMPLAINTS_MAX)
        self._is_closed = False
        self.ranks: dict[int, int] = {}
        self._reader = threading.Thread(target=self._read, name="mpirun", daemon=True)
        self._reader.start()

    @classmethod
    async def start(
        cls, command: Sequence[str], directory: Path, size: int, deadline: float, lost: Callable[[LinkError], None]
    ) -> "Mpirun":
        """Starts mpirun and waits until all placeholders have reported, or the loop's clock shows `deadline`.

        `lost` is called on this loop should mpirun end by itself after that. Raises StartError, with mpirun's output.
        """
        try:
            process = await asyncio.to_thread(_popen, command, directory)
        except FileNotFoundError as error:
            raise StartError(
                f"{command[0]} was not found, which sockets between chips need: install galaxyline[galaxy], or choose "
                "the transport 'host'."
            ) from error
        mpirun = cls(process, size, lost)
        try:
            seconds = max(0.0, deadline - asyncio.get_running_loop().time())
            await asyncio.wait_for(asyncio.shield(mpirun._complete), seconds)
        except asyncio.TimeoutError:
            missing = sorted(set(range(size)) - set(mpirun.ranks))
            await mpirun.close()
            raise StartError(
                f"mpirun did not bring up ranks {missing} of {size} in time: {mpirun._complaint()}"
            ) from None
        except BaseException:
            await asyncio.shield(mpirun.close())
            raise
        return mpirun

    @property
    def pids(self) -> list[int]:
        """The pid of mpirun itself, then those of the placeholders, by rank."""
        return [self._process.pid, *(pid for _, pid in sorted(self.ranks.items()))]

    async def close(self) -> None:
        """Ends mpirun, and thereby daemons and placeholders. Raises PipelineError if they stay."""
        self._is_closed = True
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()  # Rank 0 ends, whereupon mpirun ends the others and waits for them.
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # The kernel then ends its placeholders.
            self._process.wait(END_SECONDS)
        self._reader.join(END_SECONDS)
        if self._reader.is_alive():
            raise PipelineError(f"Processes {self.pids[1:]} of mpirun did not end with it.")
        if self._process.stdout is not None:
            self._process.stdout.close()

    # The reading thread

    def _read(self) -> None:
        """Reads until the pipe ends, whose other end mpirun and all its children hold."""
        pipe = self._process.stdout
        for line in pipe or ():
            if rank := _RANK_LINE.fullmatch(line.strip()):
                self._loop.call_soon_threadsafe(self._note_rank, int(rank["rank"]), int(rank["pid"]))
            elif line.strip(" -\n"):
                self._complaints.append(line.strip())
        if not self._is_closed:
            self._loop.call_soon_threadsafe(self._ended)

    def _note_rank(self, rank: int, pid: int) -> None:
        self.ranks[rank] = pid
        if len(self.ranks) == self._size and not self._complete.done():
            self._complete.set_result(None)

    def _ended(self) -> None:
        if self._is_closed:
            return
        if self._complete.done():
            self._lost(LinkError(f"lost the MPI world: mpirun ended: {self._complaint()}", "lost"))
        else:
            self._complete.set_exception(StartError(f"mpirun ended before its ranks were up: {self._complaint()}"))

    def _complaint(self) -> str:
        return " ".join(self._complaints) or "it gave no reason"


def _popen(command: Sequence[str], directory: Path) -> "subprocess.Popen[str]":
    # `ray job stop` sends SIGTERM to all descendants of a job at once, but the pipeline ends mpirun and placeholders in
    # their turn. What a thread blocks stays blocked in all that it starts; mpirun's own handlers then never run.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        return subprocess.Popen(  # noqa: S603 - the command is our own
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=mpirun_environment(directory),
            # Ctrl-C is for the pipeline's process too.
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
