"""What a stage says of itself: while it loads, and while it runs."""

import os
from pathlib import Path
from typing import Literal

import msgspec

_STATM = Path("/proc/self/statm")

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    """What of it lies in physical memory, shared pages such as mapped weight files included."""
    return int(_STATM.read_bytes().split()[1]) * _PAGE_BYTES


Phase = Literal["starting", "loading", "connecting", "ready"]

State = Literal["loading", "ready", "running", "blocked", "failed", "closed", "silent", "dead"]


class StageProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a stage has come in starting; `layers_done` of `layers` have their weights.

    It has `rows` of its host's Galaxy rows.
    """

    stage: int
    host: str
    rows: list[int]
    phase: Phase
    layers_done: int
    layers: int


class StageHealth(msgspec.Struct, frozen=True, kw_only=True):
    """How a stage fares.

    "running" is within a step, `step_id`, since `step_seconds`; "blocked" has done it and waits for the next stage to
    take it; else `step_id` is None. "silent" did not answer in time and "dead" has lost its process: only `stage`,
    `host`, `pid` and `detail` mean something then. `received_step` is the last step that came in and `passed_step` the
    last that was handed on to the next stage, or to the engine; None before the first since the stage was joined to
    its neighbours. `busy_seconds` of all steps done, together with the time between
    two reports, give the share of time that the stage computes. `resident_bytes` is its process's memory.
    `received_bytes` have come by the link from the stage before, or from the engine, and `sent_bytes` gone to the next
    one, which listens at `sent_to`, a socket's path or HOST:PORT: frames with all that is in them, of the links there
    are now.
    """

    stage: int
    host: str
    pid: int
    state: State
    step_id: int | None
    step_seconds: float
    received_step: int | None
    steps_done: int
    busy_seconds: float
    layers_done: int
    layers: int
    resident_bytes: int
    detail: str
    received_bytes: int = 0
    sent_bytes: int = 0
    sent_to: str = ""
    passed_step: int | None = None
