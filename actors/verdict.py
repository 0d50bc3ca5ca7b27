"""From what the engine noticed and what the stages say to who is to blame, and the one sentence that names it."""

import math
from collections.abc import Sequence

import msgspec

from actors.stage.health import StageHealth
from stages.step import StageFailure


class Symptom(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine noticed first: a stage's own report, or a lost link or passed deadline (`failure` is None).

    `outstanding` are the steps whose results were awaited, in order. `is_late` where the first of them has passed its
    deadline: only then can a stage that computes be a stage that is stuck.
    """

    outstanding: list[int]
    cause: str
    failure: StageFailure | None
    is_late: bool = False

    @property
    def oldest(self) -> int | None:
        """The step whose result would have come next."""
        return self.outstanding[0] if self.outstanding else None


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Who failed, and why. `is_lost` where its process cannot be used any more: it is gone or stuck.

    `step_id` is the step that may have made it fail, None where none can have.
    """

    sentence: str
    stage: int | None
    step_id: int | None
    is_lost: bool


def verdict(symptom: Symptom, healths: Sequence[StageHealth]) -> Verdict:
    """Names stage, host, step and cause.

    A stage whose process is dead explains every lost link around it, so it comes first; then one that does not
    answer; then the report; then a stage that says it failed, before one that merely lost its neighbour; and last,
    where a step is late, the one that works on its step the longest.
    """
    for state in ("dead", "silent"):
        for health in healths:
            if health.state == state:
                cause = f"{health.detail} ({symptom.cause})"
                return _blame(health.stage, health.host, _interrupted(symptom, healths, health.stage), cause, lost=True)
    failure = symptom.failure
    failed = sorted((health for health in healths if health.state == "failed"), key=_is_follow_up)
    step_id = symptom.oldest if failure is None or failure.step_id < 0 else failure.step_id
    if failed and (failure is None or failure.cause.startswith(LOST)) and not _is_follow_up(failed[0]):
        return _blame(failed[0].stage, failed[0].host, step_id, failed[0].detail)
    if failure is not None:
        return _blameless(_blame(failure.stage, failure.host, step_id, failure.cause), failure.cause)
    if failed:
        return _blameless(_blame(failed[0].stage, failed[0].host, step_id, failed[0].detail), failed[0].detail)
    running = [health for health in healths if health.state == "running"]
    if running and symptom.is_late:
        stuck = max(running, key=lambda health: health.step_seconds)
        cause = f"{symptom.cause}, and the stage has been computing step {stuck.step_id} for {stuck.step_seconds:.1f} s"
        return _blame(stuck.stage, stuck.host, step_id, cause, lost=True)
    sentence = f"The pipeline failed {_when(step_id)}: {symptom.cause}; no stage reports a failure."
    return Verdict(sentence=sentence, stage=None, step_id=step_id if symptom.is_late else None, is_lost=False)


LOST = "lost the link"
"""How a stage's report begins that says no more than that its neighbour is gone."""


def _interrupted(symptom: Symptom, healths: Sequence[StageHealth], stage: int) -> int | None:
    """The step that a stage which says nothing worked on: the first that was handed to it and has not come out of it.

    The stages around it tell which those are. None where there is none: what never got there cannot have hurt it.
    """
    answering = [health for health in healths if health.state not in {"dead", "silent"}]
    handed_on = min((_last(health.passed_step) for health in answering if health.stage < stage), default=math.inf)
    came_out = max((_last(health.received_step) for health in answering if health.stage > stage), default=-1)
    return next((step_id for step_id in symptom.outstanding if came_out < step_id <= handed_on), None)


def _last(step_id: int | None) -> int:
    return -1 if step_id is None else step_id


def _blame(stage: int, host: str, step_id: int | None, cause: str, *, lost: bool = False) -> Verdict:
    sentence = f"Stage {stage} on {host} failed {_when(step_id)}: {cause}."
    return Verdict(sentence=sentence, stage=stage, step_id=step_id, is_lost=lost)


def _blameless(found: Verdict, cause: str) -> Verdict:
    """The same without a step, if it was a link that was lost: no request makes a link break."""
    return msgspec.structs.replace(found, step_id=None) if cause.startswith(LOST) else found


def _when(step_id: int | None) -> str:
    return "between steps" if step_id is None else f"at step {step_id}"


def _is_follow_up(health: StageHealth) -> bool:
    return health.detail.startswith(LOST)
