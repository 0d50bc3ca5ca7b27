"""A Ray cluster on loopback that outlives the servers, or the pipelines, which join it: they start in half the time.

As a program, `python -m tests.support.ray_cluster ROWS` starts one, prints the environment with which it is joined as
one line of JSON, and ends it when its standard input does.
"""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import pytest

from actors.cluster.environment import prepare_environment
from actors.run_directory import RunDirectory
from tests import ROOT

if TYPE_CHECKING:
    from actors.cluster.cluster import Cluster

JOINING = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
"""Variables of the process that starts a cluster which processes that join it need too."""
EXIT_DEADLINE = 30.0


@contextlib.contextmanager
def running_ray(rows: int) -> Iterator[Mapping[str, str]]:
    """Starts a cluster of one host with `rows` galaxy rows; yields the environment with which a process joins it."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    # Its workers run what tests and benchmarks name as their stages' runners.
    environment["PYTHONPATH"] = str(ROOT)
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.ray_cluster", str(rows)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        # Before it, on a busy machine, may come the warning that Ray has to be started once more.
        yield json.loads(next(line for line in process.stdout if line.startswith("{")))
        process.communicate(timeout=EXIT_DEADLINE)
    assert process.returncode == 0


@contextlib.contextmanager
def ray_of_this_process(rows: int) -> "Iterator[Cluster]":
    """Starts one Ray for all pipelines that this process starts within the block: they find it and leave it running.

    Their temporary files lie in a directory of their own, so that what is left there is theirs.
    """
    own = RunDirectory.create()
    directory = tempfile.mkdtemp(prefix="gl-")  # Sockets need a short path.
    with pytest.MonkeyPatch.context() as environment:
        environment.setattr(tempfile, "tempdir", directory)
        prepare_environment(None)
        from actors.cluster.cluster import Cluster  # noqa: PLC0415 - imports Ray, which reads what `prepare_environment` has set

        joined = asyncio.run(Cluster.join(None, rows, own.ray))
        yield joined
        asyncio.run(joined.leave())
    own.remove()
    shutil.rmtree(directory, ignore_errors=True)


async def hold(rows: int) -> None:
    """Starts the cluster, prints how to join it, and ends it when standard input ends."""
    prepare_environment(None)
    import ray  # noqa: PLC0415 - reads what `prepare_environment` has set

    from actors.cluster.cluster import Cluster  # noqa: PLC0415

    directory = RunDirectory.create()
    cluster = await Cluster.join(None, rows, directory.ray)
    address = await cluster.call(lambda: str(ray.get_runtime_context().gcs_address))
    print(json.dumps({"RAY_ADDRESS": address, **{name: os.environ[name] for name in JOINING}}), flush=True)  # noqa: T201
    await asyncio.to_thread(sys.stdin.read)
    await cluster.leave()
    directory.remove()


if __name__ == "__main__":
    asyncio.run(hold(int(sys.argv[1])))
