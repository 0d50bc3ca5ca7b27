"""An mpirun that is a program of the test, and the agent that mpirun starts its daemons with."""

import asyncio
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from actors.errors import LinkError, StartError
from actors.mpi import placeholder
from actors.mpi.mpirun import Mpirun, mpirun_command, write_agent
from stages.step import Host
from tests.support.loops import on_uvloop

SECONDS = 20.0
HERE = Host(node_id="n1", name="host-a", address="10.0.0.1", rows=4)
THERE = Host(node_id="n2", name="host-b", address="10.0.0.2", rows=4)


def options_of(command: list[str]) -> list[str]:
    return command[: command.index(sys.executable)]


def test_each_stage_has_a_rank_on_its_host() -> None:
    command = mpirun_command([HERE, HERE, THERE, THERE, THERE], "n1", "agent")
    options = options_of(command)

    assert command[0] == str(Path(sys.executable).with_name("mpirun"))
    assert options[options.index("--np") + 1] == "5"
    assert options[options.index("--host") + 1] == "host-a:2,host-b:3"
    assert options[options.index("plm_ssh_agent") + 1] == "agent"
    assert "lo" not in options


def test_a_world_of_this_host_stays_on_loopback() -> None:
    options = options_of(mpirun_command([HERE, HERE], "n1", "agent"))

    assert options[options.index("btl_tcp_if_include") + 1] == "lo"
    assert options[options.index("ptl_tcp_if_include") + 1] == "lo"
    assert "lo" not in options_of(mpirun_command([THERE], "n1", "agent"))


def fake_mpirun(ranks: list[int], then: str) -> list[str]:
    """The command of a program that starts real placeholders for some ranks, as their parent, then does something."""
    program = f"""
import os, subprocess, sys
for rank in {ranks}:
    environment = dict(os.environ, {placeholder.RANK_VARIABLE}=str(rank))
    subprocess.Popen([sys.executable, "-I", {placeholder.__file__!r}], env=environment)
{then}
"""
    return [sys.executable, "-c", program]


WAIT = "sys.exit(os.wait()[1] and 1)"
COMPLAIN = "print('No such host.'); sys.exit(1)"


async def started(command: list[str], directory: Path, size: int, lost: list[LinkError], seconds: float) -> Mpirun:
    deadline = asyncio.get_running_loop().time() + seconds
    return await Mpirun.start(command, directory, size, deadline, lost.append)


@on_uvloop
async def test_ranks_tell_who_they_are_and_end_with_the_world(tmp_path: Path) -> None:
    lost: list[LinkError] = []
    world = await started(fake_mpirun([1, 0], WAIT), tmp_path, 2, lost, SECONDS)
    processes = [psutil.Process(pid) for pid in world.pids]

    assert [processes[1 + rank].environ()[placeholder.RANK_VARIABLE] for rank in (0, 1)] == ["0", "1"]

    for number in (signal.SIGTERM, signal.SIGINT):
        processes[0].send_signal(number)  # Meant for the pipeline, which ends its world itself.
    assert processes[0].is_running()
    await world.close()
    await world.close()
    gone, alive = psutil.wait_procs(processes, SECONDS)
    assert (len(gone), alive, lost) == (3, [], [])


@on_uvloop
async def test_an_mpirun_that_ends_at_once_says_why(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"^mpirun ended before its ranks were up: No such host\.$"):
        await started(fake_mpirun([], COMPLAIN), tmp_path, 2, [], SECONDS)


@on_uvloop
async def test_ranks_that_do_not_come_are_named_at_the_deadline(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"^mpirun did not bring up ranks \[1\] of 2 in time: it gave no reason$"):
        await started(fake_mpirun([0], WAIT), tmp_path, 2, [], 2.0)


@on_uvloop
async def test_no_mpirun_is_said_with_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"^/nowhere/mpirun was not found, .* install galaxyline\[galaxy\]"):
        await started(["/nowhere/mpirun"], tmp_path, 2, [], SECONDS)


@on_uvloop
async def test_an_mpirun_that_ends_later_is_told_once_and_takes_its_ranks_along(tmp_path: Path) -> None:
    told: asyncio.Queue[LinkError] = asyncio.Queue()
    deadline = asyncio.get_running_loop().time() + SECONDS
    world = await Mpirun.start(fake_mpirun([0, 1], WAIT), tmp_path, 2, deadline, told.put_nowait)
    processes = [psutil.Process(pid) for pid in world.pids[1:]]
    psutil.Process(world.pids[0]).kill()

    assert str(await asyncio.wait_for(told.get(), SECONDS)).startswith("lost the MPI world: mpirun ended: ")
    assert psutil.wait_procs(processes, SECONDS)[1] == []
    await world.close()
    assert told.empty()


async def test_the_agent_hands_host_and_command_over_and_ends_as_the_command_did(tmp_path: Path) -> None:
    asked: list[dict[str, str]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(json.loads(await reader.readline()))
        writer.write(b"7\n")
        writer.close()

    path, agent = tmp_path / "s", tmp_path / "agent"
    write_agent(agent, str(path))
    server = await asyncio.start_unix_server(serve, path)
    # mpirun sometimes puts an empty argument first.
    process = await asyncio.create_subprocess_exec(str(agent), "", "host-b", "PATH=/x;", "prted", "--a b")
    status = await asyncio.wait_for(process.wait(), SECONDS)
    server.close()

    assert stat.S_IMODE(os.stat(agent).st_mode) == 0o700  # noqa: PTH116 - pathlib blocks as much
    assert (status, asked) == (7, [{"host": "host-b", "command": "PATH=/x; prted --a b"}])


def test_an_agent_that_nobody_answers_fails(tmp_path: Path) -> None:
    agent = tmp_path / "agent"
    write_agent(agent, str(tmp_path / "nobody"))

    done = subprocess.run(shlex.split(f"{agent} host-b true"), capture_output=True, timeout=SECONDS, check=False)

    assert done.returncode != 0
