"""What a stage's process enters an MPI world with, before ttnn is imported."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.errors import StartError
from actors.mpi import placeholder
from actors.mpi.membership import Membership

RANK = 2


@pytest.fixture
def identity(tmp_path: Path) -> dict[str, str]:
    """The variables of a rank: more than mpirun would pass on in one chunk if they were printed."""
    variables = {"PMIX_SERVER_TMPDIR": str(tmp_path), "PMIX_URI": "a=b;c=\udcff", "OMPI_LONG": 4096 * "x"}
    return {"OMPI_COMM_WORLD_RANK": str(RANK), **variables}


@pytest.fixture
def holder(identity: dict[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """A placeholder that has printed its line."""
    command = [sys.executable, "-I", placeholder.__file__]
    environment = {**os.environ, **identity}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"RANK {RANK} {process.pid}\n"
            yield process
        finally:
            process.kill()


def test_the_environment_names_rank_and_mesh(
    identity: dict[str, str], holder: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    environment = {"HOME": "/root", "TT_VISIBLE_DEVICES": "7"}

    Membership(rank=RANK, mesh_graph="the graph", placeholder=holder.pid).apply(environment)

    descriptor = Path(environment.pop("TT_MESH_GRAPH_DESC_PATH"))
    assert descriptor.read_text() == "the graph"
    assert (descriptor.parent, descriptor.suffix) == (tmp_path, ".textproto")
    assert environment == {
        **identity,
        "HOME": "/root",
        "TT_VISIBLE_DEVICES": "7",
        "TT_MESH_ID": "2",
        "TT_MESH_HOST_RANK": "0",
    }


def test_a_placeholder_that_is_gone_is_named(holder: "subprocess.Popen[str]") -> None:
    holder.kill()
    holder.wait()

    with pytest.raises(
        StartError, match=rf"rank 2, process {holder.pid}, cannot be read: No such file or directory\.$"
    ):
        Membership(rank=RANK, mesh_graph="", placeholder=holder.pid).apply({})


def test_another_process_is_not_taken_for_the_placeholder(holder: "subprocess.Popen[str]") -> None:
    environment: dict[str, str] = {}

    for rank, pid in ((RANK, os.getpid()), (RANK + 1, holder.pid)):
        with pytest.raises(StartError, match=rf"^Process {pid} is not the placeholder of rank {rank}: "):
            Membership(rank=rank, mesh_graph="", placeholder=pid).apply(environment)

    assert environment == {}
