"""Damage to the files in which stages keep blocks of the KV cache, and whether they keep within their bounds."""

import random
from collections.abc import Callable
from pathlib import Path

from benchmarks.chaos.server import KV_BYTES, ChaosServer

SPOTS = 64
SPOT_BYTES = 512
"""Damaged spots of a file, and the bytes of each: enough to hit many of its records, and its table too."""


def damage(server: ChaosServer, draw: random.Random) -> None:
    """Overwrites, cuts short or deletes each of the files, as chance has it."""
    for file in [*server.host_tier_files(), *server.disk_tier_files()]:
        draw.choice(WAYS)(file, draw)


def excess(server: ChaosServer) -> dict[str, int]:
    """The bytes that the files have over what they may, by tier."""
    sizes = {
        "bytes in memory": sum(file.stat().st_blocks * 512 for file in server.host_tier_files()) - KV_BYTES,
        "bytes on disk": sum(file.stat().st_blocks * 512 for file in server.disk_tier_files()) - KV_BYTES,
    }
    return {name: size for name, size in sizes.items() if size > 0}


def _overwrite(file: Path, draw: random.Random) -> None:
    size = file.stat().st_size
    with file.open("r+b") as opened:
        for _ in range(SPOTS):
            opened.seek(draw.randrange(max(size, 1)))
            opened.write(draw.randbytes(SPOT_BYTES))


def _cut_short(file: Path, draw: random.Random) -> None:
    with file.open("r+b") as opened:
        opened.truncate(draw.randrange(file.stat().st_size + 1))


def _delete(file: Path, _: random.Random) -> None:
    file.unlink()


WAYS: tuple[Callable[[Path, random.Random], None], ...] = (_overwrite, _overwrite, _cut_short, _delete)
