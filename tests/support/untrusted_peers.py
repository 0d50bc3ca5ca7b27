"""Untrusted peers that connect to the stages of a server behind a gate (tests/support/gated_serve.py)."""

import asyncio
import contextlib
import json
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest

from actors.sockets.frames import HEADER
from tests.support.gated_serve import Overheard
from tests.support.greetings import UNTRUSTED

SECONDS = 120
SECRET = slice(HEADER.size + 3, HEADER.size + 35)
"""The bytes of a hello that are its secret: 32, after the marks of a msgpack array and of its first entry."""


def overheard(gate: Path) -> list[Overheard]:
    """Returns what was overheard of each epoch, in order."""
    told = [json.loads(file.read_text(encoding="utf-8")) for file in gate.glob("*.json")]
    return sorted((Overheard(**fields) for fields in told), key=lambda one: one.epoch)


async def heard_anew(gate: Path, epoch: int) -> Overheard:
    """Waits for what is overheard of a later epoch than that one."""
    deadline = asyncio.get_running_loop().time() + SECONDS
    while (latest := overheard(gate)[-1]).epoch <= epoch:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.05)
    return latest


def besiege(before: Overheard, now: Overheard) -> list[socket.socket]:
    """Connects all untrusted peers to all stages that listen; returns those that send nothing, and stay."""
    silent = []
    for stage, address in enumerate(now.addresses):
        if is_unix(address):
            assert modes(Path(address)) == (0o700, 0o600)
        silent.append(connect(address))
        for name, said in visitors(before, now, stage).items():
            assert is_refused(address, said), name
        leave_early(address, bytes.fromhex(now.hellos[stage]))
    return silent


def visitors(before: Overheard, now: Overheard, stage: int) -> dict[str, bytes]:
    """Returns what untrusted peers send, by name: greetings that are almost right, and rubbish."""
    replayed, awaited = bytes.fromhex(before.hellos[stage]), bytes.fromhex(now.hellos[stage])
    return {
        **UNTRUSTED,
        "the hello of the epoch before": replayed,
        "that hello under this epoch": awaited[: HEADER.size] + replayed[HEADER.size :],
        "another secret": awaited.replace(awaited[SECRET], bytes(32)),
        "another stage's hello": bytes.fromhex(now.hellos[stage - 1]),
    }


def nobody_listens(addresses: Sequence[str]) -> None:
    """Fails if something listens at one of the addresses."""
    for address in addresses:
        with pytest.raises(FileNotFoundError if is_unix(address) else ConnectionRefusedError):
            connect(address)


def refusals(pid: int) -> int:
    """Returns how many peers a stage has refused by its log, which Ray writes to a file."""
    return Path(f"/proc/{pid}/fd/2").read_text(encoding="utf-8").count("connection refused")


def is_unix(address: str) -> bool:
    return address.startswith("/")


def connect(address: str) -> socket.socket:
    with contextlib.ExitStack() as unless_connected:
        visitor = unless_connected.enter_context(socket.socket(socket.AF_UNIX if is_unix(address) else socket.AF_INET))
        visitor.settimeout(SECONDS)
        host, _, port = address.rpartition(":")
        visitor.connect(address if is_unix(address) else (host, int(port)))
        unless_connected.pop_all()
    return visitor


def is_refused(address: str, said: bytes) -> bool:
    """Returns whether the connection is closed without a reply."""
    with connect(address) as visitor:
        try:
            visitor.sendall(said)
            return visitor.recv(1) == b""
        except ConnectionError:
            return True


def leave_early(address: str, hello: bytes) -> None:
    """Sends frames that break off: after nothing, in the header, at its end and before the last byte."""
    for length in (0, HEADER.size // 2, HEADER.size, len(hello) - 1):
        with connect(address) as visitor:
            visitor.sendall(hello[:length])


def modes(path: Path) -> tuple[int, int]:
    """Returns the modes of a socket's directory, and of the socket."""
    return stat.S_IMODE(path.parent.stat().st_mode), stat.S_IMODE(path.stat().st_mode)
