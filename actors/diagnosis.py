"""What failed: from what the engine noticed and what the stages report to the stage, the step and one sentence."""

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from actors.stage.health import StageHealth
from stages.step import StageFailure

ReportKind = Literal["stage_failure", "lost_link", "late_step", "stray_result"]


class FailureReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine noticed first when a pipeline failed.

    `kind` is "stage_failure" where a stage reported its own `failure`, "lost_link" where a link of the engine was lost,
    "late_step" where the first outstanding step has passed its deadline, and "stray_result" where a result came that
    was not awaited. `outstanding` are the ids of the steps whose results were awaited, in order. `engine_paused_s` is
    how long the engine itself has stood still just before.
    """

    kind: ReportKind
    outstanding: list[int]
    cause: str
    failure: StageFailure | None = None
    engine_paused_s: float = 0.0

    @property
    def oldest(self) -> int | None:
        """The step whose result would have come next."""
        return self.outstanding[0] if self.outstanding else None

    @property
    def failed_step(self) -> int | None:
        """The step that a stage reported to have failed at, else the oldest one."""
        return self.oldest if self.failure is None or self.failure.step_id < 0 else self.failure.step_id

    @property
    def is_of_lost_link(self) -> bool:
        """Whether no stage has reported an error of its own."""
        return self.failure is None or self.failure.kind == "lost_link"


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """Which stage failed, and why. `is_lost` where its process cannot be used any more: it is gone or stuck.

    `stage` is None where no stage is known to have failed. `step_id` is the step that may have made it fail, None where
    none can have.
    """

    cause: str
    stage: int | None = None
    host: str = ""
    step_id: int | None = None
    failed_at: int | None = None
    is_lost: bool = False

    @property
    def sentence(self) -> str:
        """Names stage, host, step and cause, as far as they are known."""
        when = "between steps" if self.failed_at is None else f"at step {self.failed_at}"
        if self.stage is None:
            return f"The pipeline failed {when}: {self.cause}; no stage reports a failure."
        return f"Stage {self.stage} on {self.host} failed {when}: {self.cause}."


def diagnose(report: FailureReport, healths: Sequence[StageHealth]) -> Diagnosis:
    """Finds the stage that failed.

    A stage whose process is dead explains every lost link around it, so it comes first; then one that does not
    answer; then an engine that has stood still, whose links the stages have given up; then the reported failure, unless
    that is a lost link and another stage has failed by an error of its own; then a stage that has failed; and last,
    where a step is late, the stage that has computed its step the longest.
    """
    absent = _absent_stage(healths)
    if absent is not None:
        step_id = _interrupted_step(report, healths, absent.stage)
        cause = _noticed_by_neighbours(absent.stage, healths) or report.cause
        return _failed_stage(absent, step_id, f"{absent.detail} ({cause})", is_lost=True)
    if report.is_of_lost_link and report.engine_paused_s > 0 and all(map(_has_only_lost_a_link, _failed(healths))):
        cause = f"the engine stood still for {report.engine_paused_s:.1f} s"
        return Diagnosis(cause=cause, failed_at=report.failed_step)
    return _diagnose_present(report, healths)


def _diagnose_present(report: FailureReport, healths: Sequence[StageHealth]) -> Diagnosis:
    """Finds the stage that failed among stages that all answer."""
    failed = sorted(_failed(healths), key=_has_only_lost_a_link)
    if failed and report.is_of_lost_link and not _has_only_lost_a_link(failed[0]):
        return _failed_stage(failed[0], report.failed_step, failed[0].detail)
    if report.failure is not None:
        failure = report.failure
        return Diagnosis(
            cause=failure.cause,
            stage=failure.stage,
            host=failure.host,
            # No request makes a link break.
            step_id=None if failure.kind == "lost_link" else report.failed_step,
            failed_at=report.failed_step,
        )
    if failed:
        found = _failed_stage(failed[0], report.failed_step, failed[0].detail)
        return msgspec.structs.replace(found, step_id=None) if _has_only_lost_a_link(failed[0]) else found
    running = [health for health in healths if health.state == "running"]
    # Only where a step is late can a stage that computes be a stage that is stuck.
    is_late = report.kind == "late_step"
    if running and is_late:
        stuck = max(running, key=lambda health: health.step_seconds)
        cause = f"{report.cause}, and the stage has been computing step {stuck.step_id} for {stuck.step_seconds:.1f} s"
        return _failed_stage(stuck, report.failed_step, cause, is_lost=True)
    return Diagnosis(cause=report.cause, step_id=report.failed_step if is_late else None, failed_at=report.failed_step)


def _failed(healths: Sequence[StageHealth]) -> list[StageHealth]:
    return [health for health in healths if health.state == "failed"]


def _absent_stage(healths: Sequence[StageHealth]) -> StageHealth | None:
    """The first stage whose process is dead, else the first that does not answer."""
    absent = [health for state in ("dead", "silent") for health in healths if health.state == state]
    return absent[0] if absent else None


def _noticed_by_neighbours(stage: int, healths: Sequence[StageHealth]) -> str:
    """What a neighbour of an absent stage has noticed of it; others have only noticed what the neighbour did then."""
    noticed = [health for health in healths if abs(health.stage - stage) == 1 and _has_only_lost_a_link(health)]
    return noticed[0].detail if noticed else ""


def _failed_stage(health: StageHealth, step_id: int | None, cause: str, *, is_lost: bool = False) -> Diagnosis:
    return Diagnosis(
        cause=cause, stage=health.stage, host=health.host, step_id=step_id, failed_at=step_id, is_lost=is_lost
    )


def _has_only_lost_a_link(health: StageHealth) -> bool:
    return health.failure == "lost_link"


def _interrupted_step(report: FailureReport, healths: Sequence[StageHealth], stage: int) -> int | None:
    """The step that an absent stage worked on: the first that was handed to it and did not come out of it.

    It follows from what the stages around it report. None where there is none: a step that never reached the stage
    cannot have made it fail.
    """
    answering = [health for health in healths if health.state not in {"dead", "silent"}]
    handed_on = min((_last(health.passed_step) for health in answering if health.stage < stage), default=math.inf)
    came_out = max((_last(health.received_step) for health in answering if health.stage > stage), default=-1)
    return next((step_id for step_id in report.outstanding if came_out < step_id <= handed_on), None)


def _last(step_id: int | None) -> int:
    return -1 if step_id is None else step_id
