"""Blocks on disk outlive the server, for the same model and plan alone; damage costs time and no token."""

import random
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.servers import Server, serving

pytestmark = pytest.mark.slow

PROMPT = "The lighthouse keeper counts the boats on the river before the fog comes down from the hills. " * 6
SECONDS = 60
OPTIONS = ("--kv-host-memory", "0", "--kv-disk", "64M", "--dtype", "float32")


def ask(server: Server, **fields: Any) -> tuple[str, int]:
    """Returns the text after the prompt, and how many of its tokens were cached."""
    body = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "ignore_eos": True, **fields}
    answer = httpx.post(server.completions, json=body, timeout=120).json()
    return answer["choices"][0]["text"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def wait_for_disk(server: Server) -> None:
    """Waits until the prompt's blocks are on disk, which the engine hears of every few seconds."""
    deadline = time.monotonic() + SECONDS
    with httpx.Client(timeout=30) as client:
        while time.monotonic() < deadline:
            stages = client.get(f"{server.url}/pipeline").json()["stages"]
            if min(stage["disk_tier_bytes"] for stage in stages) > 0:
                return
            time.sleep(0.1)
    raise AssertionError("nothing came to the disk")


def test_blocks_outlive_the_server_for_the_same_plan_and_damage_is_a_miss(tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    options = (*OPTIONS, "--kv-dir", str(directory))
    with serving(tmp_path, *options) as server:
        text, cached = ask(server)
        assert cached == 0
        wait_for_disk(server)
    assert directory.stat().st_mode & 0o077 == 0
    assert all(file.stat().st_mode & 0o077 == 0 for file in directory.iterdir())
    with serving(tmp_path, *options) as server:
        again, cached = ask(server)
        assert again == text
        assert cached >= 64
        assert ask(server, cache_salt="another")[1] == 0
    draw = random.Random(1)
    for file in directory.glob("*.kv.*"):
        damaged = bytearray(file.read_bytes())
        for _ in range(len(damaged) // 2000):
            damaged[draw.randrange(len(damaged))] ^= 0xFF
        file.write_bytes(damaged)
    with serving(tmp_path, *options) as server:
        assert ask(server)[0] == text
        assert ask(server) == (text, cached)
    with serving(tmp_path, *options, "--stages", "3") as server:
        assert ask(server) == (text, 0)
        left = {file.name.rpartition("-")[2] for file in directory.glob("*.kv.*")}
    assert len(left) == 1
