"""Peers: processes that a benchmark starts and measures, and that never outlive it."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec

from actors.stage.process import CoreShare, apply_share, share_cores

Parameters = ParamSpec("Parameters")
Pipe = multiprocessing.connection.Connection
"""The connection of a peer to the benchmark. It ends with the benchmark, and the peer has to end with it."""

START_SECONDS = 120.0
END_SECONDS = 10.0


class PeerError(Exception):
    """A peer did not start or answer in time."""


@contextlib.contextmanager
def running_peer(
    work: Callable[Concatenate[Pipe, Parameters], None],
    share: CoreShare | None,
    *args: Parameters.args,
    **kwargs: Parameters.kwargs,
) -> Iterator[Pipe]:
    """Runs `work(pipe, ...)` in a new process, bound to `share` of the cores, until the block ends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(work, share, theirs, args, kwargs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(END_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def answer(pipe: Pipe, seconds: float = START_SECONDS) -> object:
    """Receives the peer's next message. Raises PeerError if none comes within `seconds`, or the peer has ended."""
    try:
        if not pipe.poll(seconds):
            raise PeerError(f"A process of the benchmark did not answer within {seconds:g} s.")
        return pipe.recv()
    except EOFError:
        raise PeerError("A process of the benchmark ended early; its own error is above.") from None


def wait_for_end(pipe: Pipe) -> None:
    """Waits until the benchmark closes the connection."""
    with contextlib.suppress(EOFError):
        pipe.recv()


def two_shares() -> list[CoreShare]:
    """Divides the cores of this process as between two neighbouring stages."""
    return share_cores(sorted(os.sched_getaffinity(0)), 2)


def _run(
    work: Callable[..., None], share: CoreShare | None, pipe: Pipe, args: tuple[object], kwargs: dict[str, object]
) -> None:
    if share is not None:
        apply_share(share, os.environ)
    work(pipe, *args, **kwargs)
