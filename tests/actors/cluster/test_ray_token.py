"""A cluster that the project starts is joined with its token alone, which is left in no file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.cluster import environment

SECONDS = 120
START = """
import asyncio, os
from actors.cluster.environment import prepare_environment
from actors.run_directory import RunDirectory

async def start() -> None:
    from actors.cluster.cluster import Cluster
    directory = RunDirectory.create()
    cluster = await Cluster.join(None, rows=1, directory=directory.ray)
    try:
        import ray
        print(ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"])
    finally:
        await cluster.leave()
        directory.remove()

prepare_environment(None)
asyncio.run(start())
"""
OURS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")


def test_each_start_has_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = set()
    for _ in range(2):
        for name in OURS:
            # Set first, so that what `prepare_environment` sets is undone after the test.
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        environment.prepare_environment(None)
        assert os.environ["RAY_AUTH_MODE"] == "token"
        tokens.add(os.environ["RAY_AUTH_TOKEN"])
    assert [len(token) for token in tokens] == [64, 64]


def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    environment.prepare_environment(None)
    assert (os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]) == ("disabled", "")


@pytest.mark.slow
def test_the_token_is_in_no_file(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    command = [sys.executable, "-c", START]
    started = subprocess.run(
        command,
        env={**environment, "HOME": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert started.returncode == 0, started.stderr
    _, mode, token = started.stdout.split()
    assert mode == "token"
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
    assert holders == []
    assert not (tmp_path / ".ray" / "auth_token").exists()
