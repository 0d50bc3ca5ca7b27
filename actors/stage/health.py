"""What a stage reports of itself: while it loads, and while it runs."""

from typing import Literal

import msgspec

from stages.step import FailureKind

Phase = Literal["starting", "loading", "connecting", "ready"]

State = Literal["loading", "ready", "running", "blocked", "failed", "closed", "silent", "dead"]


class StageProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a stage has come in starting: `layers_done` of its `layers` have their weights.

    `rows` are the numbers of its Galaxy rows on its host.
    """

    stage: int
    host: str
    rows: list[int]
    phase: Phase
    layers_done: int
    layers: int


class StageHealth(msgspec.Struct, frozen=True, kw_only=True):
    """The health of a stage at one moment.

    "running" is within a step, `step_id`, since `step_seconds`; "blocked" has done it and waits for the next stage to
    take it; in all other states `step_id` is None. "silent" did not answer in time and "dead" has lost its process:
    only `stage`, `host`, `pid` and `detail` mean something then. `failure` is the kind of failure where the state is
    "failed", and `detail` its cause.

    `received_step` is the last step that came in and `passed_step` the last that was handed on to the next stage, or to
    the engine; None before the first since the stage was joined to its neighbours. `busy_seconds` of all `steps_done`,
    together with the time between two reports, give the share of time that the stage computes. `resident_bytes` is its
    process's memory. `received_bytes` have come by the link from the stage before, or from the engine, and `sent_bytes`
    gone to the next one, which listens at `sent_to`, a socket's path or HOST:PORT: whole frames with all that is in
    them, on the links that exist now.
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
    failure: FailureKind | None = None
